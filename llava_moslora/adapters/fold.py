"""From the training form (A, W, B) to the published form (W·A, B), and the sums that merge either into a weight::

    adapter = read_adapter("adapter")                       # .config, .layers[name], .others; see reading.py
    weight = merge(weight, adapter.layers["model.layers.0.self_attn.q_proj"])
    save(fold(adapter), "published")                        # a plain LoRA: stock PEFT and converters load it

Pure functions of tensors: no model is needed. Shapes: A (r, in), W (r, r) or None, B (out, r), ΔW (out, in).
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from llava_moslora.errors import Refusal

PEFT_PREFIX = "base_model.model."  # what PEFT puts before every name of the base model


@dataclass(frozen=True)
class LowRank:
    """The adapter of one linear layer: ΔW = s·B·W·A, without W where nothing is mixed."""

    a: torch.Tensor  # (r, in)
    w: torch.Tensor | None  # (r, r)
    b: torch.Tensor  # (out, r)
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Adapter:
    """One adapter as read from a file. Names are those of the base model's modules, without PEFT's prefix."""

    config: LoraConfig  # a MosLoraConfig, or a plain LoraConfig once folded
    layers: dict[str, LowRank]
    others: dict[str, torch.Tensor]  # modules_to_save and biases: the base model's parameter name → tensor


def delta(a: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """ΔW = s·B·W·A (out, in), in fp32, or fp64 if A is (paper eq. 7, in PyTorch's orientation)."""
    a = folded(a, w)
    return (b.to(a.dtype) @ a) * scaling


def folded(a: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    """A' = W·A (r, in), in fp32, or fp64 if A is: with B unchanged, a plain LoRA of the same rank."""
    a = a.to(torch.promote_types(a.dtype, torch.float32))
    return a if w is None else w.to(a.dtype) @ a


def merge(weight: torch.Tensor, layer: LowRank) -> torch.Tensor:
    """``weight + ΔW`` (out, in), summed in fp32 and rounded once to the dtype of ``weight``.

    Raises:
        Refusal: K-MERGE if ``weight`` is not a floating-point matrix of ΔW's shape, as a quantised one is not.
    """
    shape = (len(layer.b), layer.a.shape[1])
    if not weight.is_floating_point() or tuple(weight.shape) != shape:
        raise Refusal(
            "K-MERGE",
            "the adapter does not fit the weight",
            found=f"{weight.dtype} {tuple(weight.shape)}",
            expected=f"a floating-point matrix {shape}",
            fix="merge into the original 16-bit weights or into dequantised ones",
        )
    update = delta(layer.a, layer.w, layer.b, layer.scaling).to(weight.device)
    return (weight.to(update.dtype) + update).to(weight.dtype)


def fold(adapter: Adapter) -> Adapter:
    """The published form: W·A (fp32) in the place of A, and the configuration of a plain LoRA. ΔW is the same."""
    layers = {
        name: dataclasses.replace(layer, a=folded(layer.a, layer.w), w=None) for name, layer in adapter.layers.items()
    }
    kept = {f.name: getattr(adapter.config, f.name) for f in dataclasses.fields(LoraConfig)}
    return Adapter(LoraConfig(**kept), layers, adapter.others)


def named_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The tensors under the names that PEFT saves them by."""
    tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in adapter.others.items()}
    for name, layer in adapter.layers.items():
        for part, tensor in (("A", layer.a), ("mixer", layer.w), ("B", layer.b)):
            if tensor is not None:
                tensors[f"{PEFT_PREFIX}{name}.lora_{part}.weight"] = tensor.contiguous()
    return tensors


def save(adapter: Adapter, folder: str | Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does: a folded adapter as a plain LoRA,
    any other in training form."""
    config = copy.copy(adapter.config)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(named_tensors(adapter), Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
