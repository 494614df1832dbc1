"""One row of benchmarks/train.py: a run in a process of its own, timed step by step.

This package's is scripts/train_vit_llm.py as a user starts it. Stock is PEFT's LoRA on
``LlavaForConditionalGeneration`` under a plain Hugging Face Trainer, over the same batches, from the same collator,
with the same optimizer and loader settings. The same callback (train_meter.py) measures both.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import runpy
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from llava_moslora.errors import Refusal

ROOT = Path(__file__).parents[1]
STOCK = {"stock": True, "stock-bf16": False}  # name → whether PEFT's adapters are in float32, its default
RECOMPUTE = re.compile(r"none|full|selective|every:[1-9]\d*")
ADAPTER_KERNELS = ("torch", "triton")
PROFILED = 2  # steps


@dataclass(frozen=True)
class Row:
    """What is run: ``stock``, ``stock-bf16``, or this package under a file of zero_configs, such as
    ``zero2+selective+liger+triton@4``.

    Args:
        base: ``stock``, ``stock-bf16`` or the name of a DeepSpeed file.
        recompute: what backward recomputes: ``none``, ``full``, ``selective`` or ``every:N``.
        liger: Liger's kernels in the LLM.
        kernel: ``torch`` or ``triton`` for the adapters; None: the package's choice.
        bits: 16, or 4 for an NF4 LLM.
        batch: records per step; None: ``--batch``.
    """

    base: str
    recompute: str = "full"
    liger: bool = False
    kernel: str | None = None
    bits: int = 16
    batch: int | None = None

    @classmethod
    def parse(cls, text: str) -> Row:
        """
        Raises:
            Refusal: not a row's name.
        """
        expected = "stock, stock-bf16 or ZERO[+none|full|selective|every:N][+liger][+torch|triton][+4bit], then [@N]"
        name, _, batch = text.partition("@")
        base, *words = name.split("+")
        settings: dict[str, object] = {}
        for word in words:
            if RECOMPUTE.fullmatch(word):
                key, value = "recompute", word
            elif word in ADAPTER_KERNELS:
                key, value = "kernel", word
            elif word in ("liger", "4bit"):
                key, value = ("liger", True) if word == "liger" else ("bits", 4)
            else:
                raise Refusal("C-FLAG", f"unknown word in a row: {word!r}", key="--rows", found=text, expected=expected)
            if key in settings:
                raise Refusal("C-FLAG", f"two words for {key}", key="--rows", found=text, expected=expected)
            settings[key] = value
        known = base in STOCK or re.fullmatch(r"zero\w+", base)
        if not known or ("@" in text and not re.fullmatch(r"[1-9]\d*", batch)) or (base in STOCK and words):
            raise Refusal("C-FLAG", "not a row of this benchmark", key="--rows", found=text, expected=expected)
        return cls(base, batch=int(batch) if batch else None, **settings)

    @property
    def name(self) -> str:
        """As :meth:`parse` reads it, without the batch."""
        if self.base in STOCK:
            return self.base
        words = [self.base, self.recompute, *["liger"] * self.liger, *filter(None, [self.kernel])]
        return "+".join([*words, *["4bit"] * (self.bits == 4)])


@dataclass(frozen=True)
class Job:
    """A row and everything that its process needs; sent between processes as JSON."""

    row: str
    batch: int
    steps: int
    warm_up: int
    lengths: str
    layers: int | None
    tiny: bool
    profile: bool
    workers: int
    folder: str  # of the models
    data: str
    records: int  # in it
    run: str  # the run folder, made by the row; result.json, log and the mark that it has the GPU lie next to it
    port: int

    @property
    def total_steps(self) -> int:
        return self.steps + PROFILED * self.profile

    def file(self, name: str) -> Path:
        return Path(f"{self.run}.{name}")

    @property
    def llm(self) -> Path:
        return Path(self.folder) / ("llm" if self.layers is None else f"llm-{self.layers}")


class GpuLock:
    """One run at a time on the GPU: the next one may load its weights while this one is measured."""

    def __init__(self, job: Job):
        self.job, self.waited = job, None
        self.lock = os.open(Path(job.folder) / "gpu.lock", os.O_RDWR | os.O_CREAT)

    def acquire(self) -> float:
        """Returns the seconds that this took."""
        if self.waited is not None:
            return self.waited
        before = time.monotonic()
        fcntl.flock(self.lock, fcntl.LOCK_EX)  # until this process ends
        self.waited = time.monotonic() - before
        self.job.file("has-gpu").touch()
        return self.waited


def run_row(job: Job) -> None:
    """Measure, and write ``result.json`` next to the run folder whatever happens."""
    begin = time.monotonic()
    from train_meter import timed_trainers

    gpu, row = GpuLock(job), Row.parse(job.row)
    result: dict[str, object] = {"status": "ok"}
    timers: list = []
    try:
        if row.bits == 4:
            gpu.acquire()  # weights are quantised on the GPU while they are loaded
        with timed_trainers(gpu.acquire, timers, job, begin):
            train_stock(job, row) if row.base in STOCK else train_ours(job, row)
    except (Exception, SystemExit) as error:
        result = {"status": status_of(error), "message": message_of(error)}
        traceback.print_exc()
    for timer in timers:
        result |= timer.result()
    write_result(job, result)


def write_result(job: Job, result: dict) -> None:
    waiting = job.file("result.json.part")
    waiting.write_text(json.dumps(result))
    os.replace(waiting, job.file("result.json"))


def message_of(error: BaseException) -> str:
    return str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"[:600]


def status_of(error: BaseException) -> str:
    if type(error).__name__ == "OutOfMemoryError" or getattr(error, "code", "") == "E-MEMORY":
        return "out of memory"
    return "refused" if isinstance(error, Refusal) else "error"


def ours_command(job: Job, row: Row) -> tuple[list[str], dict[str, str]]:
    """The arguments of scripts/train_vit_llm.py and what is added to its environment."""
    folder, rank = Path(job.folder), 4 if job.tiny else 64
    settings = common_settings(job) | {
        "deepspeed": ROOT / "zero_configs" / f"{row.base}.json",
        "model_name_or_path": job.llm,
        "vision_tower": folder / "clip",
        "pretrain_mm_mlp_adapter": folder / "projector.safetensors",
        "data_path": job.data,
        "image_folder": folder / "images",
        "data_cache": folder / "cache",
        "data_order": "sequential",
        "model_max_length": longest(job),
        "bits": row.bits,
        "lora_r": rank,
        "vision_lora_r": rank,
        "health_steps": 0,
        "recompute": row.recompute,
        "use_liger_kernel": row.liger,
    }
    arguments = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return arguments, {"LLAVA_MOSLORA_KERNEL": row.kernel} if row.kernel else {}


def longest(job: Job) -> int:
    from train_parts import max_length

    return max_length(job.lengths)


def common_settings(job: Job) -> dict[str, object]:
    """Settings of the Trainers of all rows; with a constant learning rate their losses are comparable step by step."""
    return {
        "output_dir": job.run,
        "per_device_train_batch_size": job.batch,
        "max_steps": job.total_steps,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": job.workers,
        "dataloader_persistent_workers": job.workers > 0,
        "bf16": True,
    }


def train_ours(job: Job, row: Row) -> None:
    arguments, environment = ours_command(job, row)
    launcher = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job.port}  # what the deepspeed launcher sets
    os.environ |= environment | {name: str(value) for name, value in launcher.items()}
    script = ROOT / "scripts" / "train_vit_llm.py"
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="train_vit_llm")["main"]()


def stock_batch(batch: dict) -> dict:
    """The part of a batch that the stock model takes, with the mask that stock processors make."""
    import torch

    kept = {name: batch[name] for name in ("input_ids", "labels", "pixel_values") if name in batch}
    ids = batch["input_ids"]  # on the device already: the Trainer's loader is accelerate's
    places = torch.arange(ids.shape[1], device=ids.device)
    return kept | {"attention_mask": (places < batch["lengths"][:, None]).long()}


def train_stock(job: Job, row: Row) -> None:
    """Stock PEFT's LoRA on the stock model under a plain Trainer, over the batches of the others."""
    import torch
    from peft import LoraConfig, get_peft_model
    from train_parts import TEMPLATE
    from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments, set_seed

    from llava_moslora.config import DataSettings, ModelSettings
    from llava_moslora.data.collate import Collator
    from llava_moslora.data.image_transform import ImageTransform
    from llava_moslora.data.prepare import prepare
    from llava_moslora.models.adapt import linear_suffixes
    from llava_moslora.models.assemble import assemble
    from llava_moslora.models.names import LLM, PROJECTOR, VISION_TOWER
    from llava_moslora.models.towers import tokens_per_image
    from llava_moslora.text.tokenizer import load_tokenizer

    folder, rank = Path(job.folder), 4 if job.tiny else 64
    tokenizer = load_tokenizer(job.llm)
    set_seed(42)
    parts = ModelSettings(str(job.llm), str(folder / "clip"), str(folder / "projector.safetensors"))
    model, preprocessor = assemble(parts, tokenizer=tokenizer, dtype=torch.bfloat16)
    model.__class__ = LlavaForConditionalGeneration  # the same weights under the stock forward
    model.set_attn_implementation("sdpa")
    names = "|".join(name for tower in (LLM, VISION_TOWER) for name in linear_suffixes(model, tower))
    set_seed(42)
    config = LoraConfig(
        r=rank,
        lora_alpha=128,
        alpha_pattern={f"{re.escape(VISION_TOWER)}\\..*": 16},  # the script's defaults
        lora_dropout=0.05,
        target_modules=rf"(?:{LLM}|{VISION_TOWER})\.(?:encoder\.)?layers\.\d+\.(?:{names})",
        modules_to_save=[PROJECTOR],
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=STOCK[row.base])
    model.enable_input_require_grads()
    settings = DataSettings(
        data_path=[str(job.data)],
        image_folder=str(folder / "images"),
        model_max_length=longest(job),
        data_cache=str(folder / "cache"),
    )
    patches = tokens_per_image(model.config.vision_config)
    dataset = prepare(settings, tokenizer=tokenizer, template=TEMPLATE, tokens_per_image=patches)
    transform = ImageTransform.from_settings(preprocessor, settings)
    collate = Collator(tokenizer.pad_token_id, folder / "images", transform)

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
    }
    args = TrainingArguments(**common_settings(job) | own)
    Stock(model=model, args=args, train_dataset=dataset, data_collator=collate).train()
    assert model.is_gradient_checkpointing
