"""The settings of a run: what may be asked for, with defaults and choices. Plain data; nothing is loaded or looked up.

A field is a command-line flag of the same name, its ``help`` the flag's help text. Functions of the package take the
settings as whole objects, and ``run.json`` stores them and is read back into them (:mod:`llava_moslora.runs.record`).
No torch is imported here, no file is opened, no process group is needed.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llava_moslora.errors import Refusal, unknown_value

BITS = (16, 4)
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
ASPECT_RATIOS = ("pad", "crop")
IMAGE_ENGINES = ("pil", "torch")
DATA_ORDERS = ("modality_length", "shuffle", "sequential")
BAD_RECORD_POLICIES = ("fail", "quarantine")
# Adapter methods; llava_moslora.adapters.methods has a row for each.
ADAPTER_METHODS = ("moslora", "lora", "folded", "tsmix", "dora", "rslora", "pissa", "loha", "lokr", "adalora", "flora",
                   "loraxs", "nlora")  # fmt: skip
QUANTISED = {f"q{method}": f"--method {method} --bits 4" for method in ("lora", "moslora")}  # as papers name them
# Methods with a fixed mixer, or none → (its init, whether it is trained)
FIXED_MIXERS = dict.fromkeys(("lora", "rslora", "pissa"), ("identity", False)) | {"tsmix": ("butterfly", False)}
WITHOUT_DROPOUT = ("loha", "lokr")  # PEFT's have no input dropout
MIXER_INITS = ("kaiming_uniform", "orthogonal", "identity", "normal", "butterfly")
LOSS_AVERAGES = ("tokens", "micro_batch")
AUTO = "auto"  # --recompute: the planner chooses (llava_moslora.planning)
RECOMPUTE_MODES = f"{AUTO} | none | full | selective | every:N"
# Headings in --help, in their order there
MODEL, DATA, ADAPTERS, TRAINING = "model", "data", "adapters", "training"
SPEED, SAVING, LOGGING = "precision, memory and speed", "saving and resuming", "logging"
HEADINGS = (MODEL, DATA, ADAPTERS, TRAINING, SPEED, SAVING, LOGGING)
# Schedules whose only state is the step
LR_SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
                "cosine_with_restarts", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
                "warmup_stable_decay")  # fmt: skip

# Prefixes and characters of values that name files or folders
HUB, OPEN_CLIP, WILDCARDS = "hub:", "open_clip:", "*?["
NAMED_FILE = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)  # of --eval_data_path

XTUNER_DATA_GROUP = 50  # global batches that XTuner's sampler sorts by length together
# With lengths like mix665k's at 16 per device, 1.9 % of tokens are padding with groups of 50, 0.9 % with 100 (shuffled:
# 42 %), on one rank as on eight, because the records of a global batch are distributed round-robin.
DATA_GROUP = 100


def setting(default: Any = dataclasses.MISSING, help: str = "", choices: tuple | None = None, **metadata: Any) -> Any:
    """A dataclass field with the help text and the choices of its flag; a list is its own default, copied."""
    metadata |= {"help": help} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """Base of the settings below: values that are not among a field's choices are refused."""

    heading: ClassVar[str]  # in --help; a field's own is its metadata's ``group``

    def __post_init__(self) -> None:
        """
        Raises:
            Refusal: C-FLAG, naming the flag, the value and the choices.
        """
        for f in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices is not None and value != f.default and value not in choices:
                raise unknown_value(f"--{f.name}", value, list(map(str, choices)))


@dataclass
class ModelSettings(Settings):
    """The three parts that a LLaVA is assembled from, or a text-only LLM, and how they are loaded."""

    heading = MODEL

    model_name_or_path: str = setting(help="folder of the LLM, or of a complete LLaVA")
    vision_tower: str | None = setting(None, "CLIP, SigLIP, open_clip:ARCH@FILE; default: the LLaVA's, or none")
    pretrain_mm_mlp_adapter: str | None = setting(None, "stage 1's projector; default: the LLaVA's, or random weights")
    version: str | None = setting(None, "conversation template; default: detected from the tokenizer")
    bits: int = setting(16, "bits per weight of the frozen LLM: 16 | 4 (NF4, QMoSLoRA)", BITS)
    attn_implementation: str = setting(
        "sdpa", "sdpa | eager | flash_attention_2 | flash_attention_3", ATTENTION_IMPLEMENTATIONS
    )

    @property
    def text_only(self) -> bool:
        """Whether there is no vision tower, once that is known
        (:func:`llava_moslora.models.llava_folder.name_parts`)."""
        return self.vision_tower is None

    @property
    def tower(self) -> str:
        """``vision_tower`` where there is one, as :attr:`text_only` tells."""
        assert self.vision_tower is not None, "text only, or a complete LLaVA whose parts are not named yet"
        return self.vision_tower

    @property
    def template(self) -> str:
        """``version``, once it is known."""
        assert self.version is not None, "the conversation template is not known yet"
        return self.version


@dataclass
class DataSettings(Settings):
    """The records, how they are checked, tokenised and ordered, and how images become the tower's input."""

    heading = DATA

    data_path: list[str] = setting(help="JSON(L), Parquet, tars, datasets folders, hub:NAME (downloads)")
    data_columns: list[str] = setting([], "NAME=COLUMN for renamed columns, such as messages=dialog")
    data_weights: list[float] = setting([], "how often each file is seen per epoch; default: once")
    eval_data_path: list[str] = setting([], "validation data: as --data_path, each FILE or NAME=FILE")
    validation_split: float = setting(0.0, "share of --data_path held out, by a hash of each record")
    data_share: float = setting(1.0, "share of each file to train on, sampled by the seed; nested")
    image_folder: str | None = setting(None, "folder that image names are relative to")
    image_aspect_ratio: str = setting("pad", "pad to a square, or crop as the tower's processor does", ASPECT_RATIOS)
    image_engine: str = setting("pil", "pil: resizing of the tower's pretraining; torch: faster", IMAGE_ENGINES)
    model_max_length: int = setting(2048, "tokens per record, image placeholders included")
    train_on_prompt: bool = setting(False, "text only: loss on every token but the first")
    data_order: str = setting(
        "modality_length", "modality_length (groups similar lengths) | shuffle | sequential", DATA_ORDERS
    )
    data_group: int = setting(DATA_GROUP, f"global batches sorted by length together; XTuner's: {XTUNER_DATA_GROUP}")
    data_cache: str = setting(".cache/llava_moslora", "cache folder for tokenised data")
    preprocessing_num_workers: int = setting(1, "processes that check and tokenise the data")
    on_bad_record: str = setting("fail", "fail | quarantine (skip bad records and list them)", BAD_RECORD_POLICIES)
    max_bad_share: float = setting(0.01, "with quarantine: maximum share of bad records")
    follow_image_links: bool = setting(False, "allow links that lead out of the image folder")
    decode_images: bool = setting(False, "decode every image before training, not only its header")

    def __post_init__(self) -> None:
        """
        Raises:
            Refusal: C-FLAG, naming the flag, the value and what may be given.
        """
        super().__post_init__()
        if not 0 < self.data_share <= 1:
            expected = "a share above 0 and at most 1"
            raise Refusal("C-FLAG", "out of range", key="--data_share", found=self.data_share, expected=expected)


@dataclass(frozen=True)
class TowerAdapter:
    """The adapter of one tower: rank, scaling = ``lora_alpha`` / ``r``, dropout, mixer.

    ``target_modules`` are suffixes of linear layers; empty: every linear layer of every block. The LLM's ``lm_head`` is
    adapted only if it is named (XTuner does so for InternLM2, whose head is called ``output``).
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.05
    mixer_init: str = "kaiming_uniform"
    train_mixer: bool = True
    target_modules: tuple[str, ...] = ()


@dataclass
class AdapterSettings(Settings):
    """What is trained. Defaults are the paper's for LLaMA-3-8B and CLIP-L (Table 8; dropout: its authors' file)."""

    heading = ADAPTERS

    tune_mm_mlp_adapter: bool = setting(False, "stage 1: train the projector only, without adapters")
    method: str = setting("moslora", " | ".join(ADAPTER_METHODS), ADAPTER_METHODS, instead=QUANTISED)
    lora_r: int = setting(64, "rank in the LLM; 0: no adapter there")
    lora_alpha: float = setting(128, "scaling = alpha / rank")
    lora_dropout: float = setting(0.05, "dropout before the LLM's adapters")
    lora_target_modules: list[str] = setting([], "suffixes of the LLM's linear layers; default: all")
    mixer_init: str = setting("kaiming_uniform", " | ".join(MIXER_INITS), MIXER_INITS)
    train_mixer: bool = setting(True, "False: freeze the mixers; with identity that is LoRA")
    vision_lora_r: int = setting(64, "rank in the vision tower; 0: no adapter there")
    vision_lora_alpha: float = setting(16, "scaling = alpha / rank")
    vision_lora_dropout: float = setting(0.05, "dropout before the tower's adapters")
    vision_lora_target_modules: list[str] = setting([], "suffixes of the tower's linear layers; default: all")
    vision_mixer_init: str | None = setting(None, "in the tower; default: as --mixer_init")
    vision_train_mixer: bool | None = setting(None, "in the tower; default: as --train_mixer")

    @property
    def llm(self) -> TowerAdapter | None:
        """The LLM's adapter; None where its rank is 0."""
        return self._tower("", self.mixer_init, self.train_mixer)

    @property
    def vision(self) -> TowerAdapter | None:
        """The vision tower's adapter; None where its rank is 0."""
        train_mixer = self.train_mixer if self.vision_train_mixer is None else self.vision_train_mixer
        return self._tower("vision_", self.vision_mixer_init or self.mixer_init, train_mixer)

    @property
    def uses_dropout(self) -> bool:
        """Whether an adapter drops anything; stage 1 has none."""
        towers = () if self.tune_mm_mlp_adapter else (self.llm, self.vision)
        return any(tower is not None and tower.lora_dropout > 0 for tower in towers)

    def _tower(self, prefix: str, mixer_init: str, train_mixer: bool) -> TowerAdapter | None:
        r, alpha, dropout, targets = (
            getattr(self, f"{prefix}lora_{name}") for name in ("r", "alpha", "dropout", "target_modules")
        )
        if not r:
            return None
        train_mixer = train_mixer and self.method != "folded"
        mixer_init, train_mixer = FIXED_MIXERS.get(self.method, (mixer_init, train_mixer))
        dropout = 0.0 if self.method in WITHOUT_DROPOUT else dropout
        return TowerAdapter(r, alpha, dropout, mixer_init, train_mixer, tuple(targets))


@dataclass
class TrainingSettings(Settings):
    """This package's training flags; :mod:`llava_moslora.training.arguments` adds those of transformers."""

    heading = TRAINING

    output_dir: str = setting("", "the run folder: checkpoints, settings, logs", group=SAVING)
    global_batch_size: int | None = setting(None, "records per step, all ranks; sets --gradient_accumulation_steps")
    vision_lr: float | None = setting(None, "learning rate of the tower's adapters; default: --learning_rate")
    mm_projector_lr: float | None = setting(None, "learning rate of the projector; default: --learning_rate")
    mixer_lr: float | None = setting(None, "learning rate of the mixers; default: as their adapter's")
    lora_plus_ratio: float = setting(1.0, "LoRA+: learning rate of B divided by that of A")
    riemannian: bool = setting(False, "precondition the gradients of A and B; without DeepSpeed")
    loss_average: str = setting("tokens", "mean over the batch's tokens, or of micro_batch means", LOSS_AVERAGES)
    packing: bool = setting(False, "several records per row; for --data_order shuffle")
    recompute: str | None = setting(None, f"{RECOMPUTE_MODES}; default: none", group=SPEED)
    early_stopping_patience: int | None = setting(None, "stop after N evaluations in a row without improvement")
    early_stopping_threshold: float = setting(0.0, "smallest change that counts as an improvement")
    plan_check: bool = setting(True, "refuse a run that cannot fit the GPU's memory", group=SPEED)
    sample_questions: str | None = setting(
        None, "file of questions to answer during training, as --data_path", group=LOGGING
    )
    sample_image_folder: str | None = setting(None, "of --sample_questions; default: as --image_folder", group=LOGGING)
    sample_steps: int = setting(500, "answer --sample_questions every N steps", group=LOGGING)
    sample_max_new_tokens: int = setting(64, "longest answer to --sample_questions, in tokens", group=LOGGING)
    health_steps: int = setting(500, "log adapter statistics every N steps; 0: never", group=LOGGING)
    resume: bool = setting(False, "continue the run from its newest checkpoint, or start it", group=SAVING)
    allow_change: list[str] = setting([], "flags, without dashes, that may differ from the resumed run", group=SAVING)
    overwrite: bool = setting(False, "delete the run in --output_dir and start a new one", group=SAVING)

    def __post_init__(self) -> None:
        """
        Raises:
            Refusal: C-FLAG, a flag is missing, has an unknown value, or contradicts another one.
        """
        super().__post_init__()
        if not self.output_dir:
            raise Refusal("C-FLAG", "missing flag", key="--output_dir", fix="name the folder of the run")
        if self.resume and self.overwrite:
            raise Refusal("C-FLAG", "a run is either continued or deleted", key="--resume, --overwrite")
        if self.recompute not in (None, AUTO):
            parse_recompute(self.recompute)

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir)


@dataclass
class TrainerSettings:
    """Flags of transformers' Trainer with another type, default or help text here."""

    gradient_accumulation_steps: int | None = setting(
        None, "micro-batches per step; default: as --global_batch_size asks", group=TRAINING
    )
    logging_steps: float = setting(1, "log every N steps; below 1: a share of all steps", group=LOGGING)
    logging_nan_inf_filter: bool = setting(False, "no effect: a loss that is NaN or Inf stops the run")
    report_to: list[str] = setting(
        ["tensorboard"], "besides metrics.jsonl: tensorboard, wandb, … or none", group=LOGGING
    )
    remove_unused_columns: bool = setting(False, "leave it False: the collator reads columns that would be dropped")
    dataloader_num_workers: int = setting(
        -1, "processes per rank that read images; -1: as the cores allow", group=SPEED
    )
    dataloader_persistent_workers: bool = setting(True, "keep the data loader's processes between epochs")
    ignore_data_skip: bool = setting(True, "leave it True: the data loader itself starts where the run stopped")
    lr_scheduler_type: str = setting(
        "cosine", "linear | constant | cosine_with_min_lr | …", LR_SCHEDULES, group=TRAINING
    )
    warmup_steps: float = setting(0.03, "warmup in steps; below 1: a share of all steps", group=TRAINING)
    eval_steps: float | None = setting(None, "default: as --save_steps; below 1: a share of all steps", group=TRAINING)
    per_device_eval_batch_size: int | None = setting(None, "default: as --per_device_train_batch_size")
    load_best_model_at_end: bool = setting(False, "export, chat and evaluate take the best checkpoint", group=SAVING)
    metric_for_best_model: str | None = setting(
        None, "loss (default) or token_accuracy, of all validation sets together; NAME_loss, … of one of several"
    )
    # The Trainer's switch for full recomputation: transformers renamed it in 5.23 and will drop the old name in 6.
    gradient_checkpointing: bool | None = setting(None, "True: as --recompute full")
    activation_checkpointing: bool | None = setting(None, "True: as --recompute full")


def parse_recompute(text: str) -> tuple[str, int]:
    """``--recompute``'s value as (mode, N): ("none", 0), ("full", 1), ("selective", 1) or ("full", N) for every:N.

    Raises:
        Refusal: C-FLAG for anything else. ``auto`` must have been decided before.
    """
    assert text != AUTO, "--recompute auto is decided before it is used"
    if text in ("none", "full", "selective"):
        return text, int(text != "none")
    name, _, count = text.partition(":")
    if name == "every" and count.isdecimal() and int(count) > 0:
        return "full", int(count)
    raise Refusal("C-FLAG", "unknown mode", key="--recompute", found=text, expected=RECOMPUTE_MODES)
