"""An adapter in memory: merged into weights (ΔW = s·B·W·A), folded into a plain LoRA (A' = W·A), renamed, saved::

    adapter = read_adapter("adapter")                       # .config, .layers[name], .others; see load.py
    weight = merge(weight, adapter.layers["model.layers.0.self_attn.q_proj"])
    save(fold(adapter), "published")                        # a plain LoRA: stock PEFT and converters load it

``scripts/convert_adapter.py`` does this on the command line. No model is needed, and tensors are read from their file
lazily. Shapes: A (r, in), W (r, r) or None, B (out, r), ΔW (out, in).
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig, PeftConfig

from llava_moslora.adapters.config import PATTERN_FIELDS, MosLoraConfig, config_of_layers
from llava_moslora.errors import Refusal, few
from llava_moslora.files.disk import write_json
from llava_moslora.files.tensors import LazyTensor, save_tensors

PEFT_PREFIX = "base_model.model."  # what PEFT puts before every name of the base model
# Fields of a LoRA's adapter_config.json in every version of PEFT: before 0.14 it fails on an unknown field.
COMMON_FIELDS = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights", "use_rslora", "use_dora"),
)
# Configuration fields that name modules, or that are set per module by patterns
_NAMING = {"peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
           *PATTERN_FIELDS, *PATTERN_FIELDS.values()}  # fmt: skip


class Update(Protocol):
    """What an adapter adds to the weight of one linear layer."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of ΔW: (out, in)."""

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """As PEFT stores them: the name after the linear's, such as ``lora_A.weight`` → tensor."""

    def merged_rows(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        """``rows`` (n, in) of the weight, from row ``begin`` on, with the adapter: float32[n, in], or float64 of a
        float64 adapter."""


class Additive(ABC):
    """An :class:`Update` that does not depend on the weight it is added to."""

    @abstractmethod
    def delta_rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows ``begin`` to ``end`` of ΔW: float32[end - begin, in], or float64 of a float64 adapter."""

    def merged_rows(self, rows: torch.Tensor, begin: int) -> torch.Tensor:
        update = self.delta_rows(begin, begin + len(rows)).to(rows.device)
        return rows.to(update.dtype) + update


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    """The :class:`Update` of LoRA and MoSLoRA: ΔW = s·B·W·A, without W in a plain LoRA; of PiSSA s·(B·A − B₀·A₀)."""

    a: LazyTensor  # (r, in)
    w: LazyTensor | None  # (r, r)
    b: LazyTensor  # (out, r)
    scaling: float
    start: tuple[LazyTensor, LazyTensor] | None = None  # A₀ (r, in) and B₀ (out, r)

    @classmethod
    def of(cls, a: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor, scaling: float) -> LowRank:
        """Of tensors in memory."""
        lazy_w = None if w is None else LazyTensor.of(w, Path())
        return cls(LazyTensor.of(a, Path()), lazy_w, LazyTensor.of(b, Path()), scaling)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        a0, b0 = self.start or (None, None)
        parts = {"lora_A.weight": self.a, "lora_mixer.weight": self.w, "lora_B.weight": self.b}
        parts |= {"lora_start_A.weight": a0, "lora_start_B.weight": b0}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def delta_rows(self, begin: int, end: int) -> torch.Tensor:
        a, b = _folded_factors(self)
        return delta(a, None, b[begin:end], self.scaling)

    def folded(self) -> LowRank:
        """The same ΔW without W: A is W·A, in float32. For PiSSA at twice the rank: A over A₀, B next to −B₀."""
        a = self.a.then(lambda a: folded(a, None if self.w is None else self.w.read()))
        if self.start is None:
            return LowRank(a, None, self.b, self.scaling)
        a0, b0 = self.start
        (out, i), rank = self.shape, 2 * self.rank
        a = a.then(lambda a: torch.cat([a, a0.read().to(a.dtype)]), (rank, i))
        b = self.b.then(lambda b: torch.cat([b, -b0.read()], dim=1), (out, rank))
        return LowRank(a, None, b, self.scaling)


@lru_cache(maxsize=1)  # a weight is merged block by block: its factors are read and folded once
def _folded_factors(layer: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    plain = layer.folded()
    return plain.a.read(), plain.b.read()


@dataclass(frozen=True)
class Adapter:
    """One adapter as read from a file. Names are those of the base model's modules, without PEFT's prefix."""

    config: PeftConfig  # a MosLoraConfig, or a plain LoraConfig once folded
    layers: Mapping[str, Update]
    others: dict[str, LazyTensor]  # modules_to_save and biases: the base model's parameter name → tensor


def delta(a: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """ΔW = s·B·W·A (out, in), in fp32, or fp64 if A is (paper eq. 7, in PyTorch's orientation)."""
    a = folded(a, w)
    return (b.to(a.dtype) @ a) * scaling


def folded(a: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    """A' = W·A (r, in), in fp32, or fp64 if A is: with B unchanged, a plain LoRA of the same rank."""
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    return a if w is None else w.to(a.dtype) @ a


def add(weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """``weight + update``, rounded once to the dtype of ``weight``."""
    return (weight.to(update.dtype) + update).to(weight.dtype)


def merge(weight: torch.Tensor, update: Update) -> torch.Tensor:
    """``weight + ΔW`` (out, in), summed in fp32 and rounded once to the dtype of ``weight``.

    Raises:
        Refusal: K-MERGE if ``weight`` is not a floating-point matrix of ΔW's shape, as a quantised one is not.
    """
    if not weight.is_floating_point() or tuple(weight.shape) != update.shape:
        raise Refusal(
            "K-MERGE", "the adapter does not fit the weight", found=f"{weight.dtype} {tuple(weight.shape)}",
            expected=f"a floating-point matrix {update.shape}",
            fix="merge into the original 16-bit weights or into dequantised ones",
        )  # fmt: skip
    return update.merged_rows(weight, 0).to(weight.dtype)


def fold(adapter: Adapter) -> Adapter:
    """The same ΔW as a plain LoRA: A is W·A (fp32), and the configuration is a ``LoraConfig``.

    Raises:
        Refusal: K-ADAPTER, the adapter's method is not low-rank.
    """
    layers = fold_layers(adapter.layers)
    fields = {f.name: getattr(adapter.config, f.name) for f in dataclasses.fields(LoraConfig)}
    if any(isinstance(layer, LowRank) and layer.start for layer in adapter.layers.values()):  # at twice the rank
        times = 2 * (0.5**0.5 if adapter.config.use_rslora else 1)
        fields |= {"r": 2 * fields["r"], "lora_alpha": times * fields["lora_alpha"]}
        fields["rank_pattern"] = {name: 2 * rank for name, rank in fields["rank_pattern"].items()}
        fields["alpha_pattern"] = {name: times * alpha for name, alpha in fields["alpha_pattern"].items()}
    return Adapter(LoraConfig(**fields), layers, adapter.others)


def fold_layers(layers: Mapping[str, Update]) -> dict[str, LowRank]:
    """Every layer as a plain LoRA.

    Raises:
        Refusal: as :func:`fold`.
    """
    result = {}
    for name, layer in layers.items():
        if not isinstance(layer, LowRank):
            what, fix = "this adapter method cannot be written as a plain LoRA", "merge it into the weights"
            raise Refusal("K-ADAPTER", what, key=name, found=type(layer).__name__, expected="LoRA or MoSLoRA", fix=fix)
        result[name] = layer.folded()
    return result


def rename_adapter(adapter: Adapter, new_name: Callable[[str], str]) -> Adapter:
    """The adapter with every name mapped by ``new_name``, and a configuration that lists all layers.

    Raises:
        Refusal: K-ADAPTER, two layers would get the same name, or the method is neither LoRA nor MoSLoRA.
    """
    config = adapter.config
    if not isinstance(config, MosLoraConfig):
        raise Refusal("K-ADAPTER", "names of this adapter method cannot be changed", found=type(config).__name__)
    layers = {new_name(name): layer for name, layer in adapter.layers.items()}
    if len(layers) < len(adapter.layers):
        same = [name for name, count in Counter(map(new_name, adapter.layers)).items() if count > 1]
        raise Refusal("K-ADAPTER", "two layers get the same name", found=few(same))
    names = [f.name for f in dataclasses.fields(config) if f.name not in _NAMING]
    settings = {new_name(name): config.settings_of(name) for name in adapter.layers}
    others = {new_name(name): tensor for name, tensor in adapter.others.items()}
    return Adapter(config_of_layers(settings, {name: getattr(config, name) for name in names}), layers, others)


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """``name`` with the longest of the ``prefixes`` (old → new) that it begins with replaced."""
    fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not fitting:
        return name
    prefix = max(fitting, key=len)
    return prefixes[prefix] + name[len(prefix) :]


def named_tensors(adapter: Adapter) -> dict[str, LazyTensor]:
    """The tensors under the names that PEFT saves them by."""
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in adapter.others.items()}
    for module, layer in adapter.layers.items():
        tensors |= {f"{PEFT_PREFIX}{module}.{name}": tensor for name, tensor in layer.tensors.items()}
    return tensors


def save(adapter: Adapter, folder: str | Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does: a folded adapter as a plain LoRA,
    any other in training form."""
    save_config(adapter.config, Path(folder))
    tensors = {name: tensor.read().contiguous() for name, tensor in named_tensors(adapter).items()}
    save_tensors(tensors, Path(folder) / "adapter_model.safetensors")


def save_config(config: PeftConfig, folder: Path) -> None:
    """Write ``adapter_config.json``; for a plain LoRA without fields that older versions of PEFT do not have, unless
    they are set."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(config)
    config.inference_mode = True
    if type(config) is not LoraConfig:
        config.save_pretrained(str(folder))
        return
    stored, default = config.to_dict(), LoraConfig().to_dict()
    fields = [*COMMON_FIELDS, *(key for key in stored if key not in COMMON_FIELDS and stored[key] != default[key])]
    stored = {key: sorted(v) if isinstance(v := stored[key], set) else v for key in fields}
    write_json(folder / "adapter_config.json", stored)
