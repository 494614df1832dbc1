"""The settings of a run: what may be asked for, with defaults and choices. Plain data; nothing is loaded or looked up.

A field is a command-line flag of the same name, its ``help`` the flag's help text. Functions of the package take the
settings as whole objects, and ``run.json`` stores them and is read back into them (:mod:`llava_moslora.runs.record`).
No torch is imported here, no file is opened, no process group is needed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llava_moslora.errors import Refusal

BITS = (16, 4)
ATTENTION_IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
ASPECT_RATIOS = ("pad", "crop")
IMAGE_ENGINES = ("pil", "torch")
DATA_ORDERS = ("modality_length", "shuffle", "sequential")
BAD_RECORD_POLICIES = ("fail", "quarantine")
MIXER_INITS = ("kaiming_uniform", "orthogonal", "identity", "normal", "butterfly")
LOSS_AVERAGES = ("tokens", "micro_batch")
RECOMPUTE_MODES = "none | full | selective | every:N"

XTUNER_DATA_GROUP = 50  # global batches that XTuner's sampler sorts by length together
# Lengths like mix665k's at 16 per device lose 1.9 % to padding with groups of 50, 0.9 % with 100 (shuffled: 42 %), on
# one rank as on eight, whose shares of a batch are dealt in turn.
DATA_GROUP = 100


def setting(default: Any = dataclasses.MISSING, help: str = "", choices: tuple | None = None, **metadata: Any) -> Any:
    """A dataclass field with the help text and the choices of its flag; a list is its own default, copied."""
    metadata |= {"help": help} | ({"choices": choices} if choices else {})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """Base of the settings below: values that are not among a field's choices are refused."""

    _argument_group_name: ClassVar[str]  # the heading in --help, where transformers' parser looks for it

    def __post_init__(self) -> None:
        """
        Raises:
            Refusal: C-FLAG, naming the flag, the value and the choices.
        """
        for f in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices is not None and value != f.default and value not in choices:
                expected = " | ".join(map(str, choices))
                raise Refusal("C-FLAG", "unknown value", key=f"--{f.name}", found=value, expected=expected)


@dataclass
class ModelSettings(Settings):
    """The three parts that a LLaVA is assembled from, or an LLM alone, and how they are loaded."""

    _argument_group_name = "the model"

    model_name_or_path: str = setting(help="folder of the LLM, or of a complete LLaVA")
    vision_tower: str | None = setting(
        None,
        "CLIP or SigLIP folder, or open_clip:ARCH@FILE; default: the one in a complete LLaVA, else none: the LLM is "
        "trained on text alone",
    )
    pretrain_mm_mlp_adapter: str | None = setting(
        None, "projector from stage 1, file or folder; default: the complete LLaVA's, else random weights"
    )
    version: str | None = setting(None, "name of the conversation template; default: recognised from the tokenizer")
    bits: int = setting(16, "per weight of the frozen LLM; 4: NF4, quantised while loading (QMoSLoRA)", BITS)
    attn_implementation: str = setting("sdpa", "attention of both towers", ATTENTION_IMPLEMENTATIONS)

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
        assert self.version is not None, "the conversation template is not recognised yet"
        return self.version


@dataclass
class DataSettings(Settings):
    """The records, how they are checked, tokenised and ordered, and how images become the tower's input."""

    _argument_group_name = "the data"

    data_path: list[str] = setting(
        help="files of records: JSON, JSONL or Parquet, tar shards with the images (mix/*.tar), folders of datasets' "
        "save_to_disk, or hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT], which alone downloads"
    )
    data_columns: list[str] = setting(
        [], "NAME=COLUMN: columns of the data that have another name than their record format's: messages=dialog"
    )
    data_weights: list[float] = setting([], "how often each file of --data_path is seen per epoch; default: once")
    image_folder: str | None = setting(None, "folder that image names are relative to")
    image_aspect_ratio: str = setting(
        "pad", "pad to a square, or crop as the tower's image processor does", ASPECT_RATIOS
    )
    image_engine: str = setting(
        "pil", "resizing; pil: as towers were trained; torch: faster, pixels differ by up to 1/256", IMAGE_ENGINES
    )
    model_max_length: int = setting(2048, "tokens per record, image placeholders included")
    train_on_prompt: bool = setting(
        False, "text only: the loss of questions too, of every token but the first (LLM-Adapters' train_on_inputs)"
    )
    data_order: str = setting(
        "modality_length", "modality_length: batches of similar length, with images or without", DATA_ORDERS
    )
    data_group: int = setting(
        DATA_GROUP, f"for modality_length: global batches sorted by length together; XTuner's: {XTUNER_DATA_GROUP}"
    )
    data_cache: str = setting(".cache/llava_moslora", "folder where tokenised data is kept and found again")
    preprocessing_num_workers: int = setting(1, "processes that check and tokenise the data")
    on_bad_record: str = setting("fail", "fail, or quarantine: skip bad records and list them", BAD_RECORD_POLICIES)
    max_bad_share: float = setting(0.01, "with quarantine: the largest share of bad records before the run is refused")
    follow_image_links: bool = setting(False, "allow symbolic links that lead out of the image folder")
    decode_images: bool = setting(False, "decode every image once before training, not only its header")


@dataclass(frozen=True)
class TowerAdapter:
    """The adapter of one tower: rank, scaling = ``lora_alpha`` / ``r``, dropout, mixer.

    ``target_modules`` are suffixes of linears; empty: every linear of every layer. The LLM's ``lm_head`` is adapted
    only where it is named (XTuner does so for InternLM2, whose head is called ``output``).
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.05
    mixer_init: str = "kaiming_uniform"
    train_mixer: bool = True
    target_modules: tuple[str, ...] = ()


@dataclass
class AdapterSettings(Settings):
    """What is trained. Defaults are the paper's for LLaMA-3-8B and CLIP-L (Table 8)."""

    _argument_group_name = "the adapters"

    tune_mm_mlp_adapter: bool = setting(False, "stage 1: train the projector only, without adapters")
    lora_r: int = setting(64, "rank in the LLM; 0: no adapter there")
    lora_alpha: float = setting(128, "scaling = alpha / rank")
    lora_dropout: float = setting(0.05, "dropout before the LLM's adapters")
    lora_target_modules: list[str] = setting([], "suffixes of the LLM's linears; default: every linear")
    mixer_init: str = setting("kaiming_uniform", "initialisation of the r × r mixers: " + " | ".join(MIXER_INITS))
    train_mixer: bool = setting(
        True, "False: mixers stay as initialised; with --mixer_init identity that is plain LoRA"
    )
    vision_lora_r: int = setting(64, "rank in the vision tower; 0: no adapter there")
    vision_lora_alpha: float = setting(16, "scaling = alpha / rank")
    vision_lora_dropout: float = setting(0.05, "dropout before the tower's adapters")
    vision_lora_target_modules: list[str] = setting([], "suffixes of the tower's linears; default: every linear")
    vision_mixer_init: str | None = setting(None, "as --mixer_init, in the tower; default: the same")
    vision_train_mixer: bool | None = setting(None, "as --train_mixer, in the tower; default: the same")

    @property
    def llm(self) -> TowerAdapter | None:
        """The LLM's adapter; None where its rank is 0."""
        if not self.lora_r:
            return None
        return TowerAdapter(
            self.lora_r, self.lora_alpha, self.lora_dropout, self.mixer_init, self.train_mixer,
            tuple(self.lora_target_modules),
        )  # fmt: skip

    @property
    def vision(self) -> TowerAdapter | None:
        """The vision tower's adapter; None where its rank is 0."""
        if not self.vision_lora_r:
            return None
        train_mixer = self.train_mixer if self.vision_train_mixer is None else self.vision_train_mixer
        return TowerAdapter(
            self.vision_lora_r, self.vision_lora_alpha, self.vision_lora_dropout,
            self.vision_mixer_init or self.mixer_init, train_mixer, tuple(self.vision_lora_target_modules),
        )  # fmt: skip


@dataclass
class TrainingSettings(Settings):
    """This package's training flags; :mod:`llava_moslora.training.arguments` adds those of transformers."""

    _argument_group_name = "training"

    output_dir: str = setting("", "the run folder: checkpoints, settings, logs")
    global_batch_size: int | None = setting(
        None, "records per optimizer step on all ranks together; sets --gradient_accumulation_steps"
    )
    vision_lr: float | None = setting(None, "learning rate of the tower's adapters; default: as --learning_rate")
    mm_projector_lr: float | None = setting(None, "learning rate of the projector; default: as --learning_rate")
    mixer_lr: float | None = setting(None, "learning rate of the mixers; default: as the adapter around them")
    loss_average: str = setting(
        "tokens", "tokens: mean over the global batch; micro_batch: mean of the micro-batches' means, as XTuner's",
        LOSS_AVERAGES,
    )  # fmt: skip
    packing: bool = setting(
        False,
        "several records in one row of --model_max_length tokens: less padding with --data_order shuffle; the default "
        "order hardly pads",
    )
    recompute: str | None = setting(
        None,
        f"what backward recomputes instead of keeping it: {RECOMPUTE_MODES}; selective keeps the outputs of linears "
        "and attention; default: full with --gradient_checkpointing, else none",
    )
    sample_questions: str | None = setting(None, "LLaVA-format JSON with questions that are answered while training")
    sample_image_folder: str | None = setting(None, "image folder of --sample_questions; default: as --image_folder")
    sample_steps: int = setting(500, "answer --sample_questions every N steps")
    sample_max_new_tokens: int = setting(64, "longest answer to --sample_questions, in tokens")
    health_steps: int = setting(
        500, "log singular values of the mixers and norms of updates and gradients every N steps; 0: never"
    )
    resume: bool = setting(
        False, "continue the run in --output_dir from its newest checkpoint; starts one if there is none"
    )
    allow_change: list[str] = setting([], "flags, without dashes, that may differ from the run that is resumed")
    overwrite: bool = setting(False, "delete the run in --output_dir and start a new one")

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

    @property
    def run_folder(self) -> Path:
        return Path(self.output_dir)
