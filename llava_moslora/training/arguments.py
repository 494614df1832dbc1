"""The flags of ``scripts/train_vit_llm.py``: LLaVA's names where they mean the same, Hugging Face's for the rest.

Every flag is a dataclass field; the same fields can come from one YAML or JSON file (``--config FILE``), over which the
command line wins.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
from transformers import HfArgumentParser
from transformers import TrainingArguments as HfTrainingArguments

from llava_moslora.config import DATA_GROUP, DATA_ORDERS, IMAGE_ENGINES, RECOMPUTE_MODES, XTUNER_DATA_GROUP
from llava_moslora.data.loader import default_workers
from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import TowerAdapter
from llava_moslora.models.attention import IMPLEMENTATIONS
from llava_moslora.models.llava_folder import starting_parts
from llava_moslora.recompute import parse_recompute
from llava_moslora.training import process_group
from llava_moslora.training.config_file import read_config


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "folder of the LLM, or of a complete LLaVA"})
    vision_tower: str | None = field(
        default=None,
        metadata={"help": "CLIP or SigLIP folder, or open_clip:ARCH@FILE; default: the one in --model_name_or_path"},
    )
    pretrain_mm_mlp_adapter: str | None = field(default=None, metadata={"help": "pretrained projector: file or folder"})
    version: str | None = field(
        default=None, metadata={"help": "conversation template; default: told by the tokenizer"}
    )
    bits: int = field(default=16, metadata={"help": "16, or 4 for an NF4 LLM (QMoSLoRA)"})
    attn_implementation: str = field(default="sdpa", metadata={"help": " | ".join(IMPLEMENTATIONS)})

    def __post_init__(self):
        if self.attn_implementation not in IMPLEMENTATIONS:
            raise Refusal(
                "C-FLAG", "unknown value", key="--attn_implementation", found=self.attn_implementation,
                expected=" | ".join(IMPLEMENTATIONS),
            )  # fmt: skip
        if self.bits not in (4, 16):
            raise Refusal("C-FLAG", "unknown base precision", key="--bits", found=self.bits, expected="16 or 4")
        if self.vision_tower is None:  # a complete LLaVA; from here on its parts are named one by one
            llm, tower, projector = map(str, starting_parts(self.model_name_or_path))
            self.model_name_or_path, self.vision_tower = llm, tower
            self.pretrain_mm_mlp_adapter = self.pretrain_mm_mlp_adapter or projector


@dataclass
class DataArguments:
    data_path: list[str] = field(
        metadata={"help": "LLaVA-format JSON, JSONL, Parquet, or shards of images too (mix/*.tar); one or several"}
    )
    data_weights: list[float] = field(
        default_factory=list, metadata={"help": "how often each of several is seen in an epoch; default: once"}
    )
    image_folder: str | None = field(default=None, metadata={"help": "folder that image names are relative to"})
    image_aspect_ratio: str = field(default="pad", metadata={"help": "pad to a square, or crop as the tower has it"})
    image_engine: str = field(default="pil", metadata={"help": "pil: as towers were trained; torch: faster, 1/256 off"})
    model_max_length: int = field(default=2048, metadata={"help": "tokens per record, image placeholders included"})
    data_order: str = field(default="modality_length", metadata={"help": "modality_length, shuffle or sequential"})
    data_group: int = field(
        default=DATA_GROUP,
        metadata={"help": f"global batches sorted by length; XTuner's: {XTUNER_DATA_GROUP}"},
    )
    data_cache: str = field(default=".cache/llava_moslora", metadata={"help": "folder of the tokenised data"})
    preprocessing_num_workers: int = field(default=1, metadata={"help": "processes that tokenise"})
    on_bad_record: str = field(default="fail", metadata={"help": "fail, or quarantine: leave bad records out, listed"})
    max_bad_share: float = field(default=0.01, metadata={"help": "quarantine at most this share"})
    follow_image_links: bool = field(default=False, metadata={"help": "allow links out of the image folder"})
    decode_images: bool = field(default=False, metadata={"help": "decode every image once before training"})

    def __post_init__(self):
        for flag, value, known in (
            ("--image_engine", self.image_engine, IMAGE_ENGINES),
            ("--data_order", self.data_order, DATA_ORDERS),
        ):
            if value not in known:
                raise Refusal("C-FLAG", "unknown value", key=flag, found=value, expected=" | ".join(known))


@dataclass
class AdapterArguments:
    """Defaults are the paper's for LLaMA-3-8B and CLIP-L (Table 8)."""

    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "stage 1: train the projector alone"})
    lora_r: int = field(default=64, metadata={"help": "rank in the LLM; 0: no adapter there"})
    lora_alpha: float = field(default=128, metadata={"help": "scaling = alpha / rank"})
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = field(default_factory=list, metadata={"help": "suffixes; default: every linear"})
    mixer_init: str = field(default="kaiming_uniform", metadata={"help": "or orthogonal, identity, normal, butterfly"})
    train_mixer: bool = field(default=True, metadata={"help": "False with identity: plain LoRA"})
    vision_lora_r: int = field(default=64, metadata={"help": "rank in the vision tower; 0: no adapter there"})
    vision_lora_alpha: float = 16
    vision_lora_dropout: float = 0.05
    vision_lora_target_modules: list[str] = field(default_factory=list)
    vision_mixer_init: str | None = field(default=None, metadata={"help": "default: as --mixer_init"})
    vision_train_mixer: bool | None = field(default=None, metadata={"help": "default: as --train_mixer"})


@dataclass
class TrainingArguments(HfTrainingArguments):
    """``report_to`` adds to the run folder's own ``metrics.jsonl``: tensorboard, wandb, or none."""

    output_dir: str | None = field(default=None, metadata={"help": "the run folder"})
    vision_lr: float | None = field(default=None, metadata={"help": "default: as --learning_rate"})
    mm_projector_lr: float | None = field(default=None, metadata={"help": "default: as --learning_rate"})
    mixer_lr: float | None = field(default=None, metadata={"help": "default: as the adapter around it"})
    loss_average: str = field(
        default="tokens",
        metadata={"help": "over the trained tokens of the global batch, or micro_batch: a mean of means, as XTuner's"},
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "several records in a line of --model_max_length tokens: less padding with --data_order shuffle; "
            "the default order has hardly any"
        },
    )
    recompute: str | None = field(
        default=None,
        metadata={
            "help": f"what backward recomputes instead of keeping it: {RECOMPUTE_MODES}; selective keeps outputs of "
            "linears and attention; default: full with --gradient_checkpointing, else none"
        },
    )
    sample_questions: str | None = field(
        default=None, metadata={"help": "LLaVA-format JSON with questions that are answered while training"}
    )
    sample_image_folder: str | None = field(default=None, metadata={"help": "default: as --image_folder"})
    sample_steps: int = field(default=500, metadata={"help": "answer them every so many steps"})
    sample_max_new_tokens: int = field(default=64, metadata={"help": "tokens per answer"})
    health_steps: int = field(
        default=500, metadata={"help": "look at mixers, weights and gradients every so many steps; 0: never"}
    )
    resume: bool = field(default=False, metadata={"help": "go on with the run in --output_dir, if one has begun"})
    allow_change: list[str] = field(default_factory=list, metadata={"help": "settings that may differ when resuming"})
    overwrite: bool = field(default=False, metadata={"help": "delete the run that is in --output_dir"})
    # Three defaults of the Trainer that hide what a user needs to see, and one that would drop our columns.
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    report_to: None | str | list[str] = "tensorboard"  # noqa: RUF036 (the parser needs None first)
    remove_unused_columns: bool = False
    dataloader_num_workers: int = field(
        default=-1, metadata={"help": "processes per rank that read images; -1: as the cores allow, at most 8"}
    )
    dataloader_persistent_workers: bool = True
    # The order of the data is a function of the step, and our loader starts where the run stopped.
    ignore_data_skip: bool = True
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03

    def __post_init__(self):
        if not self.output_dir:
            raise Refusal(
                "C-FLAG", "missing flag", key="--output_dir", fix="name the folder that the run is written to"
            )
        if self.dataloader_num_workers < 0:
            self.dataloader_num_workers = default_workers()
        if self.resume and self.overwrite:
            raise Refusal("C-FLAG", "cannot both go on with a run and delete it", key="--resume, --overwrite")
        if not torch.cuda.is_available():
            self.use_cpu = True  # without it the Trainer refuses bf16 and counts one process
        if self.deepspeed and "RANK" in os.environ:
            process_group.join(
                timedelta(seconds=self.ddp_timeout)
            )  # the Trainer would do it too late for ZeRO-3's loading when use_cpu is set
        self._settle_recompute()
        super().__post_init__()
        if self.use_liger_kernel:
            # The loss is ours; Liger's rotary embedding writes over its inputs, which selective recomputation keeps.
            own = {"cross_entropy": False, "fused_linear_cross_entropy": False, "rope": False}
            self.liger_kernel_config = (self.liger_kernel_config or {}) | own

    def _settle_recompute(self) -> None:
        """``recompute`` from the Trainer's switch, in either of its names, where it is not given; the Trainer itself is
        not to switch anything on, as it knows no selective recomputation."""
        asked = [on for name in CHECKPOINTING if (on := getattr(self, name, None)) is not None]
        if self.recompute is None:
            self.recompute = "full" if any(asked) else "none"
        mode, _ = parse_recompute(self.recompute)
        if any(asked) and mode == "none":
            raise Refusal(
                "C-FLAG", "two flags that disagree", key="--gradient_checkpointing, --recompute",
                found="True and none", fix="leave one of the two out",
            )  # fmt: skip
        for name in CHECKPOINTING:
            if hasattr(self, name):
                setattr(self, name, None)
            if getattr(self, name + "_kwargs", None):
                raise Refusal("C-FLAG", "not taken here", key=f"--{name}_kwargs", fix="--recompute says all")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


# The Trainer's switch for full recomputation: transformers renamed it in 5.23.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")

ARGUMENTS = (ModelArguments, DataArguments, AdapterArguments, TrainingArguments)


def tower_adapters(asked: AdapterArguments) -> tuple[TowerAdapter | None, TowerAdapter | None]:
    """The LLM's and the vision tower's adapter, None where the rank is 0."""
    llm = TowerAdapter(
        asked.lora_r,
        asked.lora_alpha,
        asked.lora_dropout,
        asked.mixer_init,
        asked.train_mixer,
        tuple(asked.lora_target_modules),
    )
    vision = TowerAdapter(
        asked.vision_lora_r,
        asked.vision_lora_alpha,
        asked.vision_lora_dropout,
        asked.vision_mixer_init or asked.mixer_init,
        asked.train_mixer if asked.vision_train_mixer is None else asked.vision_train_mixer,
        tuple(asked.vision_lora_target_modules),
    )
    return (llm if llm.r else None), (vision if vision.r else None)


class _Parser(HfArgumentParser):
    def error(self, message: str):  # argparse would print its whole usage: several screens of Trainer flags
        raise Refusal("C-FLAG", message, fix="see --help")


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, AdapterArguments, TrainingArguments]:
    """The four groups of arguments from a command line.

    Raises:
        Refusal: an unknown flag (with the nearest name), a missing one, a value of the wrong type, a configuration
            or DeepSpeed file that is missing or no JSON/YAML.
    """
    parser = _Parser(ARGUMENTS, allow_abbrev=False)
    parser.add_argument("--config", help="YAML or JSON file with the same fields")
    known = {f.name for group in ARGUMENTS for f in fields(group) if f.init}
    early, _ = _early_parser().parse_known_args(argv)
    if early.config:
        argv = [*_as_flags(read_config(Path(early.config)), known, early.config), *argv]
    _check_deepspeed_file(argv)
    namespace, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        if flag.startswith("-"):
            raise Refusal("C-FLAG", "unknown flag", key=flag.split("=")[0], fix=_nearest(flag, known))
    if unknown:
        raise Refusal("C-FLAG", "a value without a flag", found=" ".join(unknown))
    values = {k: v for k, v in vars(namespace).items() if k != "config"}
    try:
        groups = parser.parse_dict(values)
    except Refusal:
        raise
    except (ValueError, ImportError, OverflowError) as error:  # the Trainer's own checks, in its words
        raise Refusal("C-FLAG", "the training arguments do not go together", found=error) from error
    return groups


def config_file(argv: list[str]) -> str | None:
    """The ``--config`` of a command line."""
    return _early_parser().parse_known_args(argv)[0].config


def _early_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--deepspeed")
    return parser


def _nearest(flag: str, known: set[str]) -> str:
    name = flag.lstrip("-").split("=")[0].replace("-", "_")
    close = difflib.get_close_matches(name, known, n=5)
    # people get the end of a name wrong more often than its beginning: --lora_rank means --lora_r, not --local_rank
    best = max(close, key=lambda other: _shared_start(name, other), default=None)
    return f"did you mean --{best}?" if best else "see --help"


def _shared_start(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _as_flags(content: dict[str, str | list[str]], known: set[str], path: str) -> list[str]:
    flags = []
    for key, value in content.items():
        if key not in known:
            raise Refusal("C-FLAG", "unknown key", file=path, key=str(key), fix=_nearest(str(key), known))
        flags += [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"]
    return flags


def _check_deepspeed_file(argv: list[str]) -> None:
    early, _ = _early_parser().parse_known_args(argv)
    if early.deepspeed is None:
        return
    path = Path(early.deepspeed)
    if not path.is_file():
        raise Refusal("C-PATH", "no such file", file=path, key="--deepspeed", fix="the package's are in zero_configs/")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise Refusal("C-PARSE", "not UTF-8", file=path, key="--deepspeed", found=error.reason) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}: {error.msg}"
        raise Refusal("C-PARSE", "not JSON", file=path, key="--deepspeed", found=place) from error
    # The Trainer looks into these while it reads its flags.
    blocks = {"--deepspeed": config}
    if isinstance(config, dict):
        blocks = {name: config.get(name, {}) for name in ("zero_optimization", "bf16", "fp16")}
    for name, block in blocks.items():
        if not isinstance(block, dict):
            raise Refusal("C-DEEPSPEED", "not a mapping", file=path, key=name, found=block, expected="{…}")
