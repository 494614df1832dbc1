"""The adapter methods of ``--method``: one row each, as a PEFT configuration.

LoRA and methods that add something between, before or after its factors use this package's own layer
(``MosLoraConfig``); the others are stock PEFT. Nothing here depends on the models that are adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig

from llava_moslora.adapters.config import PATTERN_FIELDS, MosLoraConfig, check_even_rank
from llava_moslora.config import FIXED_MIXERS, WITHOUT_DROPOUT, AdapterSettings, TowerAdapter, TrainingSettings
from llava_moslora.errors import Refusal

MIXER_FLAGS = ("mixer_init", "train_mixer", "vision_mixer_init", "vision_train_mixer")


@dataclass(frozen=True)
class AdapterMethod:
    """A row.

    Attributes:
        title: the method's name in tables.
        config: the class of its configuration. fixed: fields of it that the method sets.
        names: field of :class:`TowerAdapter` → field of the configuration. A tower's dropout is only there where the
            method has one.
        patterns: field of :class:`TowerAdapter` → field of the configuration that maps module patterns to its values.
            Fields that are missing cannot differ between LLM and vision tower.
        trained: the kinds of tensors that are trained. saved: those that are saved with them, because no base model
            has them.
        not_over_nf4: why it cannot be trained over NF4 weights; "" where it can.
        not_under_zero3: why it cannot be trained under ZeRO-3; "" where it can.
        rate: the learning rate of the paper's Table 7; None: not in it.
    """

    title: str
    config: type[PeftConfig] = MosLoraConfig
    fixed: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=lambda: {name: name for name in PATTERN_FIELDS})
    patterns: Mapping[str, str] = field(default_factory=lambda: PATTERN_FIELDS)
    trained: tuple[str, ...] = ("lora_A", "lora_B")
    saved: tuple[str, ...] = ()
    not_over_nf4: str = ""
    not_under_zero3: str = ""
    rate: float | None = None

    @property
    def own_layer(self) -> bool:
        """Whether it is this package's layer, whose update is a product of low-rank factors."""
        return self.config is MosLoraConfig


_LORA = {"r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_LYCORIS = {"r": "r", "lora_alpha": "alpha"}
_RANKS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
_THREE = ("lora_A", "lora_mixer", "lora_B")
_SHAPES = "PEFT computes {0} from the shape of the weight, and 4-bit weights are stored in a different shape"
_PARTS = "PEFT computes LoHa's factors from the shape of the weight, and ZeRO-3 has partitioned the weights by then"

METHODS: dict[str, AdapterMethod] = {
    "moslora": AdapterMethod("MoSLoRA", trained=_THREE, rate=3e-5),
    "lora": AdapterMethod("LoRA", rate=3e-5),
    # MoSLoRA's init with LoRA's training: separates the effect of the init.
    "folded": AdapterMethod("mixer folded into A", fixed={"start": "folded"}),
    "tsmix": AdapterMethod("two-subspaces-mixing", saved=("lora_mixer",)),
    "dora": AdapterMethod(
        "DoRA", LoraConfig, {"use_dora": True}, _LORA, _RANKS, (*("lora_A", "lora_B"), "lora_magnitude_vector"),
        rate=3e-5,
    ),
    "rslora": AdapterMethod("rsLoRA", fixed={"use_rslora": True}),
    "pissa": AdapterMethod("PiSSA", fixed={"start": "pissa"}, saved=("lora_start_A", "lora_start_B")),
    "loha": AdapterMethod(
        "LoHa", LoHaConfig, {}, _LYCORIS, _RANKS, ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        not_over_nf4=_SHAPES.format("LoHa's factors"), not_under_zero3=_PARTS, rate=3e-5,
    ),
    "lokr": AdapterMethod(
        "LoKr", LoKrConfig, {}, _LYCORIS, _RANKS, ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        not_over_nf4=_SHAPES.format("LoKr's factors"), rate=3e-5,
    ),
    # As in the paper (appendix B.1), the target rank is the initial one: nothing is pruned, so there is no schedule,
    # only P·Λ·Q and a term that keeps P and Q orthogonal.
    "adalora": AdapterMethod(
        "AdaLoRA", AdaLoraConfig, {"total_step": 1, "tinit": 0, "tfinal": 0},
        {"r": "init_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}, {},
        ("lora_A", "lora_E", "lora_B"),
        not_under_zero3="AdaLoRA's layers and regulariser share parameters, which ZeRO-3 then cannot free", rate=3e-5,
    ),
    "flora": AdapterMethod("FLoRA", fixed={"start": "flora"}, trained=_THREE, rate=3e-5),
    "loraxs": AdapterMethod("LoRA-XS", fixed={"start": "loraxs"}, trained=("lora_mixer",), saved=("lora_A", "lora_B")),
    "nlora": AdapterMethod("NLoRA", fixed={"start": "nlora"}, trained=_THREE),
}  # fmt: skip


def method_config(
    method: str, adapter: TowerAdapter, others: Mapping[str, TowerAdapter] | None = None, **fields: Any
) -> PeftConfig:
    """The configuration of a method.

    Args:
        adapter: of all modules but those of ``others``: module pattern → its adapter.
        fields: other fields of the configuration: ``target_modules``, ``modules_to_save``.

    Raises:
        Refusal: C-FLAG, ``others`` differ from ``adapter`` in a field that this method has only once.
    """
    row = METHODS[method]
    values: dict[str, Any] = {name: getattr(adapter, own) for own, name in row.names.items()}
    if method == "adalora":
        values["target_r"] = adapter.r
    for pattern, other in (others or {}).items():
        for own in row.names:
            if own in row.patterns:
                values.setdefault(row.patterns[own], {})[pattern] = getattr(other, own)
            elif getattr(other, own) != getattr(adapter, own):
                flag = own if own.startswith("lora_") else f"lora_{own}"
                raise Refusal(
                    "C-FLAG", f"PEFT's {row.title} has one for all modules", key=f"--{flag}, --vision_{flag}",
                    found=f"{getattr(adapter, own):g} and {getattr(other, own):g}", expected="the same",
                    fix="give both the same value, or set one of the ranks to 0",
                )  # fmt: skip
    return row.config(**values, **row.fixed, **fields)


def check_method(settings: AdapterSettings, bits: int, training: TrainingSettings) -> None:
    """Refuse flags that do not apply to a method, and combinations that cannot work, before anything is loaded.

    Args:
        bits: of the frozen LLM.

    Raises:
        Refusal: C-FLAG naming the flag and the reason; C-RANK, an odd rank of two-subspaces-mixing.
    """
    method, row = settings.method, METHODS[settings.method]
    defaults = AdapterSettings()
    if settings.tune_mm_mlp_adapter and method != defaults.method:
        raise Refusal("C-FLAG", "stage 1 trains no adapters", key="--method", found=method, fix="omit it")
    for name in MIXER_FLAGS if method != "moslora" else ():
        if method == "folded" and name.endswith("mixer_init"):
            continue
        own = dict(zip(("mixer_init", "train_mixer"), FIXED_MIXERS.get(method, ()), strict=False))
        allowed = (getattr(defaults, name), own.get(name.removeprefix("vision_"), getattr(defaults, name)))
        if getattr(settings, name) not in allowed:
            _refuse(name, getattr(settings, name), f"{row.title} has a fixed mixer, or none")
    for name in ("lora_dropout", "vision_lora_dropout") if method in WITHOUT_DROPOUT else ():
        if getattr(settings, name) not in (getattr(defaults, name), 0):
            _refuse(name, getattr(settings, name), f"PEFT's {row.title} has no input dropout")
    if training.mixer_lr is not None and "lora_mixer" not in row.trained:
        _refuse("mixer_lr", training.mixer_lr, f"{row.title} trains no mixer")
    for name, off in (("mixer_lr", None), ("lora_plus_ratio", 1), ("riemannian", False)):
        if settings.tune_mm_mlp_adapter and getattr(training, name) != off:
            _refuse(name, getattr(training, name), "stage 1 trains no adapters")
    if training.lora_plus_ratio != 1 and "lora_B" not in row.trained:
        _refuse("lora_plus_ratio", training.lora_plus_ratio, f"{row.title} trains no B")
    if training.riemannian and not _is_pair(settings):
        _refuse("riemannian", True, f"its preconditioner is for a product B·A, which {row.title}'s update is not")
    if bits == 4 and row.not_over_nf4 and settings.llm is not None:
        raise Refusal("C-FLAG", row.not_over_nf4, key=f"--method {method}, --bits 4", fix="--bits 16")
    towers = {"": settings.llm, "vision_": settings.vision}
    if method == "tsmix":
        for prefix, tower in towers.items():
            if tower is not None:
                check_even_rank(f"--{prefix}lora_r", tower.r)
    if settings.llm is not None and settings.vision is not None:
        method_config(method, settings.llm, {".*": settings.vision}, target_modules=["any"])


def _is_pair(settings: AdapterSettings) -> bool:
    """Whether only A and B are trained; a frozen mixer between them counts as part of A."""
    mixers = any(tower.train_mixer for tower in (settings.llm, settings.vision) if tower is not None)
    trained = set(METHODS[settings.method].trained) - ({"lora_mixer"} if settings.method == "moslora" else set())
    return trained == {"lora_A", "lora_B"} and not (settings.method == "moslora" and mixers)


def _refuse(name: str, value: object, why: str) -> None:
    raise Refusal("C-FLAG", f"has no effect: {why}", key=f"--{name}", found=value, fix="omit it")
