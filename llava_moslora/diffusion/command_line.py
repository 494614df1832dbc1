"""The command line of ``scripts/train_sdxl.py``, and combinations of its flags that cannot work.

As :mod:`llava_moslora.training.command_line`, without the flags that only an LLM has. Neither torch nor diffusers is
imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llava_moslora.config import HEADINGS, MODEL, TrainingSettings
from llava_moslora.errors import Refusal
from llava_moslora.flags import Flag, SettingsParser, flags_of
from llava_moslora.sdxl_settings import SdxlAdapterSettings, SdxlSettings, SubjectSettings
from llava_moslora.training import trainer_flags
from llava_moslora.training.command_line import parse_with
from llava_moslora.training.flag_texts import more_help

GROUPS = (SdxlSettings, SubjectSettings, SdxlAdapterSettings, TrainingSettings)
TRAINING_FLAGS = ("output_dir", "global_batch_size", "mixer_lr", "recompute", "health_steps", "resume", "allow_change",
                  "overwrite")  # fmt: skip
# Trainer flags about evaluations, tokens and data loader workers, which do not exist here.
WITHOUT = {
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("neftune_noise_alpha", "average_tokens_across_devices", "use_liger_kernel", "liger_kernel_config"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
}
# Help texts that differ from those for an LLM
HELP = {
    "learning_rate": "peak learning rate of the adapters",
    "global_batch_size": "pictures per step, all ranks; sets --gradient_accumulation_steps",
    "per_device_train_batch_size": "pictures per micro-batch and rank",
    "recompute": "none | full, to save memory; default: none",
    "seed": "seed of adapters, dropout, order, crops and noise",
    "data_seed": "seed of order, crops and noise; default: --seed",
}


class Parser(SettingsParser):
    """Every flag of a training on a subject's pictures."""

    def __init__(self, description: str | None = None):
        own = [flag for group in GROUPS[:-1] for flag in flags_of(group)]
        own += flags_of(TrainingSettings, TRAINING_FLAGS)
        known = {flag.name for flag in own} | WITHOUT
        trainers = [flag for flag in trainer_flags.flags() if flag.name not in known]
        flags = [replace(f, help=HELP.get(f.name, f.help)) for f in (*own, *trainers)]
        first = Flag("config", "str | None", None, "YAML or JSON file with the same flags", group=MODEL)
        super().__init__([first, *flags], description, HEADINGS, more_help)

    def unknown(self, name: str) -> str:
        if name.replace("-", "_") in WITHOUT:
            return "omit it: it has no effect here"
        return trainer_flags.FORMER.get(name.replace("-", "_")) or super().unknown(name)


def parse(
    argv: Sequence[str], description: str | None = None
) -> tuple[SdxlSettings, SubjectSettings, SdxlAdapterSettings, dict[str, Any]]:
    """The settings from a command line; those of training as the values to build ``TrainingArguments`` from.

    Raises:
        Refusal: as :func:`llava_moslora.training.command_line.parse`; C-FLAG, flags that do not go together.
    """
    (model, data, adapter, _), training = parse_with(Parser(description), GROUPS, argv)
    check(data, adapter, training)
    # A loss is a mean over its micro-batch, and the pictures are in memory: no other process reads them.
    return model, data, adapter, training | {"loss_average": "micro_batch", "dataloader_num_workers": 0}


def check(data: SubjectSettings, adapter: SdxlAdapterSettings, training: dict[str, Any]) -> None:
    """
    Raises:
        Refusal: C-FLAG, a value out of range, or flags that do not go together.
    """
    for name in ("prompt", "class_prompt"):
        text = getattr(data, name)
        if text is not None and not text.strip():
            fix = 'a sentence with a rare word for the subject, such as "a photo of ikat cat"'
            raise Refusal("C-FLAG", "an empty prompt", key=f"--{name}", found=repr(text), fix=fix)
    if data.resolution < 8 or data.resolution % 8:
        raise Refusal(
            "C-FLAG", "not divisible by the VAE's factor of 8", key="--resolution", found=data.resolution,
            expected="a positive multiple of 8; 1024 is what SDXL was trained on",
        )  # fmt: skip
    if (data.class_image_folder is None) != (data.class_prompt is None):
        given = "class_prompt" if data.class_image_folder is None else "class_image_folder"
        other = "class_image_folder" if data.class_image_folder is None else "class_prompt"
        what = "prior preservation needs the class's pictures and their prompt"
        raise Refusal("C-FLAG", what, key=f"--{given}", fix=f"give --{other} too, or omit both")
    if data.class_image_folder is None and adapter.prior_loss_weight != 1.0:
        fix = "give --class_image_folder and --class_prompt, or omit it"
        raise Refusal("C-FLAG", "no effect without class pictures", key="--prior_loss_weight", fix=fix)
    check_adapter(adapter, training["mixer_lr"])
    if training["recompute"] not in (None, "none", "full"):
        raise Refusal(
            "C-FLAG", "diffusers recomputes all blocks of the UNet or none", key="--recompute",
            found=training["recompute"], expected="none | full",
        )  # fmt: skip


def check_adapter(adapter: SdxlAdapterSettings, mixer_lr: float | None) -> None:
    """Checks that PEFT would do only after everything is loaded, or not at all.

    Raises:
        Refusal: C-FLAG, a value out of range, or without effect; C-RANK, an odd rank of butterfly mixers.
    """
    if adapter.lora_r < 1:
        raise Refusal("C-FLAG", "nothing to train", key="--lora_r", found=adapter.lora_r, expected="at least 1")
    if adapter.mixer_init == "butterfly" and adapter.lora_r % 2:
        what = "the butterfly mixer pairs halves of the rank"
        raise Refusal("C-RANK", what, key="--lora_r", found=adapter.lora_r, expected="even")
    if not 0 <= adapter.lora_dropout < 1:
        expected = "a probability below 1"
        raise Refusal("C-FLAG", "out of range", key="--lora_dropout", found=adapter.lora_dropout, expected=expected)
    for name in ("lora_alpha", "snr_gamma", "prior_loss_weight"):
        value = getattr(adapter, name)
        if value is not None and not 0 < value < float("inf"):
            raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected="above 0")
    if mixer_lr is not None and not adapter.train_mixer:
        what, fix = "no effect with --train_mixer False", "omit one of them"
        raise Refusal("C-FLAG", what, key="--mixer_lr", found=mixer_lr, fix=fix)
