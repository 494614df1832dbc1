"""Stock PEFT adapters that are not just a product of A and B (DoRA, LoHa, LoKr, AdaLoRA), as updates of a weight.

PEFT itself computes ΔW, one linear layer at a time. Shapes: r rank, in/out features of a linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from llava_moslora.adapters.fold import PEFT_PREFIX, Additive, LowRank, Update
from llava_moslora.errors import Refusal
from llava_moslora.files.tensors import LazyTensor

Parts = dict[str, LazyTensor]  # short name → tensor


@dataclass(frozen=True)
class Kind:
    """How the tensors that a kind of adapter stores for a linear become an :class:`Update` of its weight.

    Attributes:
        config: the class of its configuration.
        names: name of a tensor after the linear's name, as PEFT or another implementation stores it → short name.
        needed: (configuration, layer name, short names present) → all that the layer must have.
        update: (tensors by short name, configuration, linear's name) → the update; refuses (K-ADAPTER) shapes that do
            not fit the configuration.
    """

    config: type[PeftConfig]
    names: Mapping[str, str]
    needed: Callable[[PeftConfig, str, set[str]], set[str]]
    update: Callable[[Parts, PeftConfig, str], Update]


@dataclass(frozen=True, eq=False)
class PeftUpdate(Additive):
    """The update of a method whose ΔW stock PEFT computes.

    Attributes:
        shape: of ΔW. tensors: as PEFT stores them. config: of this linear alone, which it calls ``linear``.
    """

    shape: tuple[int, int]
    tensors: dict[str, LazyTensor]
    config: PeftConfig

    def delta_rows(self, begin: int, end: int) -> Tensor:
        return _delta(self)[begin:end]


@lru_cache(maxsize=1)  # cached, because a weight is merged block by block
def _delta(update: PeftUpdate) -> Tensor:
    """ΔW (out, in), float32, by PEFT's layer over a linear without content."""
    out, i = update.shape
    linear = nn.utils.skip_init(nn.Linear, i, out, bias=False)
    model = get_peft_model(nn.ModuleDict({"linear": linear}), copy.deepcopy(update.config))
    tensors = {f"{PEFT_PREFIX}linear.{name}": tensor.read().float() for name, tensor in update.tensors.items()}
    result = set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys, f"PEFT does not know {result.unexpected_keys}"
    with torch.no_grad():
        return model.base_model.model["linear"].get_delta_weight("default")


@dataclass(frozen=True, eq=False)
class DoraUpdate:
    """DoRA: each row of W₀ + s·B·A scaled to its own magnitude, m / ‖W₀ + s·B·A‖ (Liu et al. 2024, equation 5)."""

    direction: LowRank
    magnitude: LazyTensor  # m (out)

    @property
    def shape(self) -> tuple[int, int]:
        return self.direction.shape

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        return self.direction.tensors | {"lora_magnitude_vector": self.magnitude}

    def merged_rows(self, rows: Tensor, begin: int) -> Tensor:
        moved = self.direction.merged_rows(rows, begin)
        lengths = self.magnitude.read()[begin : begin + len(rows)].to(moved)
        return moved * (lengths / moved.norm(dim=1))[:, None]


def value_of(config: PeftConfig, module: str, setting: str, pattern_field: str) -> Any:
    """A setting of one linear, with the pattern of the configuration applied as PEFT does."""
    patterns = getattr(config, pattern_field, None) or {}
    return patterns.get(get_pattern_key(patterns.keys(), module), getattr(config, setting))


def _check(parts: Parts, expected: Mapping[str, tuple[int | None, int | None]], module: str) -> None:
    """Refuse shapes that differ from the expected ones, where None matches any number."""
    for part, tensor in parts.items():
        wanted = expected[part]
        fits = len(tensor.shape) == len(wanted) and all(
            n in (None, m) for n, m in zip(wanted, tensor.shape, strict=True)
        )
        if not fits:
            shape = tuple("any" if n is None else n for n in wanted)
            what, found = f"shape of {part}", tensor.shape
            raise Refusal("K-ADAPTER", what, file=tensor.file, key=module, found=found, expected=shape)


def _of_linear(config: PeftConfig, **values: Any) -> PeftConfig:
    """The configuration for the linear alone."""
    own = copy.copy(config)
    common: dict[str, Any] = {
        "target_modules": {"linear"},
        "exclude_modules": None,
        "modules_to_save": None,
        "inference_mode": False,
    }
    common |= {"rank_pattern": None if isinstance(config, AdaLoraConfig) else {}, "alpha_pattern": {}}
    for name, value in {**common, "base_model_name_or_path": None, "task_type": None, **values}.items():
        setattr(own, name, value)
    return own


def _loha(parts: Parts, config: PeftConfig, module: str) -> PeftUpdate:
    rank = value_of(config, module, "r", "rank_pattern")
    out, i = parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[-1]
    shapes = {"hada_w1_a": (out, rank), "hada_w1_b": (rank, i), "hada_w2_a": (out, rank), "hada_w2_b": (rank, i)}
    _check(parts, shapes, module)
    alpha = value_of(config, module, "alpha", "alpha_pattern")
    return PeftUpdate((out, i), parts, _of_linear(config, r=rank, alpha=alpha))


def _lokr(parts: Parts, config: PeftConfig, module: str) -> PeftUpdate:
    rank = value_of(config, module, "r", "rank_pattern")
    whole, low = (None, None), {"a": (None, rank), "b": (rank, None)}
    _check(parts, {name: low.get(name[-1], whole) for name in parts}, module)
    sides = [[parts[name].shape for name in parts if name.startswith(factor)] for factor in ("lokr_w1", "lokr_w2")]
    rows, columns = 1, 1
    for shapes in sides:  # of each factor of the Kronecker product, itself or a product of two
        rows, columns = rows * shapes[0][0], columns * shapes[-1][1]
    alpha = value_of(config, module, "alpha", "alpha_pattern")
    return PeftUpdate((rows, columns), parts, _of_linear(config, r=rank, alpha=alpha))


def _lokr_needed(config: PeftConfig, module: str, present: set[str]) -> set[str]:
    """Each factor is stored directly, or as a product of two."""
    needed: set[str] = set()
    for factor in ("lokr_w1", "lokr_w2"):
        halves = {f"{factor}_a", f"{factor}_b"}
        needed |= halves if halves & present else {factor}
    return needed


def _adalora(parts: Parts, config: PeftConfig, module: str) -> PeftUpdate:
    rank = config.init_r
    out, i = parts["lora_B"].shape[0], parts["lora_A"].shape[-1]
    _check(parts, {"lora_A": (rank, i), "lora_E": (rank, 1), "lora_B": (out, rank)}, module)
    if config.rank_pattern:
        raise Refusal(
            "K-ADAPTER", "an AdaLoRA that has pruned ranks", file=parts["lora_A"].file, key="rank_pattern",
            fix="merge it with PEFT",
        )  # fmt: skip
    return PeftUpdate((out, i), parts, _of_linear(config))


def _dora(parts: Parts, config: PeftConfig, module: str) -> DoraUpdate:
    rank = value_of(config, module, "r", "rank_pattern")
    out, i = parts["B"].shape[0], parts["A"].shape[-1]
    _check({name: parts[name] for name in ("A", "B")}, {"A": (rank, i), "B": (out, rank)}, module)
    if parts["magnitude"].shape != (out,):
        raise Refusal("K-ADAPTER", "shape of magnitude", file=parts["magnitude"].file, key=module,
                      found=parts["magnitude"].shape, expected=(out,))  # fmt: skip
    alpha = value_of(config, module, "lora_alpha", "alpha_pattern")
    scaling = alpha / (rank**0.5 if config.use_rslora else rank)
    return DoraUpdate(LowRank(parts["A"], None, parts["B"], scaling), parts["magnitude"])


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


DORA = "LORA with use_dora"
KINDS: dict[str, Kind] = {  # by peft_type of adapter_config.json
    DORA: Kind(
        LoraConfig, {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"},
        lambda config, module, present: {"A", "B", "magnitude"}, _dora,
    ),
    "LOHA": Kind(
        LoHaConfig, _same("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        lambda config, module, present: {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, _loha,
    ),
    "LOKR": Kind(
        LoKrConfig, _same("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        _lokr_needed, _lokr,
    ),
    "ADALORA": Kind(
        AdaLoraConfig, _same("lora_A", "lora_E", "lora_B"),
        lambda config, module, present: {"lora_A", "lora_E", "lora_B"}, _adalora,
    ),
}  # fmt: skip
