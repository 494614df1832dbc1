"""MoSLoRA as a tuner of ms-swift, for every model that swift trains::

    pip install ms-swift
    swift sft --external_plugins playground/swift_moslora.py --tuner_type moslora --model MODEL --dataset DATA \\
        --lora_rank 64 --lora_alpha 128 --target_modules all-linear

swift's own flags say where the adapters go (``--target_modules``, ``--freeze_vit false``, …). The checkpoints hold the
adapter in training form, ``python scripts/convert_adapter.py`` makes a plain LoRA of it.
"""

import torch
from peft import PeftModel, get_peft_model
from swift.arguments import SftArguments
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map

from llava_moslora import MosLoraConfig


class MosLoraTuner(PeftTuner):
    """Saving and loading are PEFT's."""

    @staticmethod
    def prepare_model(args: SftArguments, model: torch.nn.Module) -> PeftModel:
        task = args.task_type.upper()
        config = MosLoraConfig(
            task_type=task,
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_rslora=args.use_rslora,
            target_modules=get_target_modules(args, model),
            modules_to_save=get_modules_to_save(args, model, task),
        )
        return get_peft_model(model, config)


tuners_map["moslora"] = MosLoraTuner
