"""The baseline of benchmarks/train.py: stock PEFT's LoRA on stock transformers models under a plain Trainer.

The batches are those of this package's rows, from the same collator, with the same optimizer and loader settings.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from train_parts import TEMPLATE, data_settings
from train_row import STOCK, Job, Row, common_settings
from transformers import (
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from llava_moslora.config import ModelSettings
from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.prepare import prepare
from llava_moslora.models.adapt import linear_suffixes
from llava_moslora.models.assemble import assemble
from llava_moslora.models.names import LLM, LLM_ALONE, PROJECTOR, VISION_TOWER
from llava_moslora.models.towers import tokens_per_image
from llava_moslora.text.tokenizer import load_tokenizer


def train_stock(job: Job, row: Row) -> None:
    """Stock PEFT's LoRA on the stock model under a plain Trainer, over the batches of the others."""
    folder, alone = Path(job.folder), row.llm_alone
    tokenizer = load_tokenizer(job.llm, images=not alone)
    set_seed(42)
    model, preprocessor = (stock_llm(job), {}) if alone else stock_llava(job, tokenizer)
    set_seed(42)
    model = get_peft_model(model, lora_config(model, job, alone), autocast_adapter_dtype=STOCK[row.base])
    model.enable_input_require_grads()
    settings = data_settings(Path(job.data), folder, job.lengths, images=not alone)
    patches = 0 if alone else tokens_per_image(model.config.vision_config)
    dataset = prepare(settings, tokenizer=tokenizer, template=TEMPLATE, tokens_per_image=patches)
    transform = None if alone else ImageTransform.from_settings(preprocessor, settings)
    collate = Collator(tokenizer.pad_token_id, settings.image_folder, transform)

    class Stock(Trainer):
        def get_batch_samples(self, *args):
            batches, tokens = super().get_batch_samples(*args)
            return [stock_batch(batch) for batch in batches], tokens

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    own = {
        "gradient_checkpointing": True,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # for which the host would wait at every step
    }
    args = TrainingArguments(**common_settings(job) | own)
    Stock(model=model, args=args, train_dataset=dataset, data_collator=collate).train()
    assert model.is_gradient_checkpointing


def stock_llm(job: Job) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(job.llm, dtype=torch.bfloat16, attn_implementation="sdpa")


def stock_llava(job: Job, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, dict]:
    """The weights of the other rows under the stock forward, and the image processor's settings."""
    folder = Path(job.folder)
    parts = ModelSettings(str(job.llm), str(folder / "clip"), str(folder / "projector.safetensors"))
    model, preprocessor = assemble(parts, tokenizer=tokenizer, dtype=torch.bfloat16)
    model.__class__ = LlavaForConditionalGeneration
    model.set_attn_implementation("sdpa")
    return model, preprocessor


def lora_config(model: PreTrainedModel, job: Job, alone: bool) -> LoraConfig:
    """LoRA in every linear of the layers of both towers, or of the LLM alone; the projector is trained whole."""
    towers = [LLM_ALONE] if alone else [LLM, VISION_TOWER]
    names = "|".join(dict.fromkeys(name for tower in towers for name in linear_suffixes(model, tower)))
    vision = {} if alone else {"modules_to_save": [PROJECTOR], "alpha_pattern": {f"{re.escape(VISION_TOWER)}\\..*": 16}}
    return LoraConfig(
        r=4 if job.tiny else 64,
        lora_alpha=128,  # the script's defaults, as the vision tower's 16
        lora_dropout=0.05,
        target_modules=rf"(?:{'|'.join(towers)})\.(?:encoder\.)?layers\.\d+\.(?:{names})",
        **vision,
    )


def stock_batch(batch: dict) -> dict:
    """The part of a batch that the stock model takes, with the mask that stock processors make."""
    kept = {name: batch[name] for name in ("input_ids", "labels", "pixel_values") if name in batch}
    ids = batch["input_ids"]  # on the device already: the Trainer's loader is accelerate's
    places = torch.arange(ids.shape[1], device=ids.device)
    return kept | {"attention_mask": (places < batch["lengths"][:, None]).long()}
