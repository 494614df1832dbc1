"""MoSLoRA over bitsandbytes' 4-bit and 8-bit linear layers, and merging over a 4-bit base.

Nothing is merged into 4-bit weights in place: requantising the sum would lose part of the adapter. It is merged
into the original 16-bit weights or into the dequantised ones, and the result says which.

Shapes: in/out features of a linear. This module needs bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn
from transformers import PreTrainedModel

from llava_moslora.adapters.fold import add
from llava_moslora.adapters.layers import MosLoraLayer
from llava_moslora.errors import Refusal


class MosLoraLinear8bitLt(MosLoraLayer, Linear8bitLt):
    """MoSLoRA over an 8-bit linear layer. Merging requantises, as in PEFT, with its rounding."""


class MosLoraLinear4bit(MosLoraLayer, Linear4bit):
    """MoSLoRA over an NF4 or FP4 linear, with or without double quantisation."""

    fused_base_layers = (bnb.nn.Linear4bit,)

    def __init__(self, base_layer, adapter_name, config, **kwargs):
        super().__init__(base_layer, adapter_name, config, **kwargs)
        # bitsandbytes otherwise repacks the weight in place at the first eval forward on a CPU with AVX512-BF16;
        # its scales lose precision, and every later dequantisation is wrong.
        self.get_base_layer().support_avx512bf16_for_cpu = False

    def merge(self, safe_merge=False, adapter_names=None):
        """Never in place: quantising the sum again would lose part of the adapter.

        Raises:
            Refusal: C-MERGE, always.
        """
        raise Refusal(
            "C-MERGE", "an adapter cannot be merged into 4-bit weights", found=type(self.get_base_layer()).__name__,
            fix="merge into the original or into the dequantised weights: llava_moslora.adapters.bnb.merge_over_4bit",
        )  # fmt: skip


def dequantised(layer: bnb.nn.Linear4bit) -> torch.Tensor:
    """The dequantised weight (out, in) of a 4-bit linear, in the dtype it was quantised from.

    Raises:
        Refusal: C-MERGE if bitsandbytes has repacked it for CPU inference, which rounds its scales.
    """
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise Refusal(
            "C-MERGE",
            "bitsandbytes has repacked this 4-bit weight for CPU inference; it cannot be dequantised any more",
            found=f"{layer.in_features}→{layer.out_features}",
            fix="load the base model again, and adapt or merge it before the first forward in eval mode",
        )
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def merge_over_4bit(
    model: PeftModel, originals: Mapping[str, torch.Tensor] | None = None
) -> tuple[nn.Module, dict[str, str]]:
    """Merge the active adapters of a model whose base is 4-bit; every 4-bit linear becomes an ``nn.Linear``.

    Args:
        model: is changed in place.
        originals: module name → the 16-bit weight (out, in) that was quantised, for all 4-bit linears. None: the
            dequantised weights, which training used.

    Returns:
        The merged base model, and what the adapters were merged into, for the metadata of what is written.

    Raises:
        Refusal: C-MERGE, an original is missing or has another shape, or a weight was repacked.
    """
    base = model.get_base_model()
    linears = {n: m for n, m in base.named_modules() if isinstance(m, MosLoraLinear4bit | bnb.nn.Linear4bit)}
    # An adapted layer is replaced as a whole, with the bare layer in it.
    linears = {n: m for n, m in linears.items() if n.rpartition(".")[0] not in linears}
    if missing := [name for name in linears if originals is not None and name not in originals]:
        what = f"{len(missing)} of {len(linears)} original weights missing"
        raise Refusal("C-MERGE", what, expected=", ".join(missing[:3]))
    kinds = set()
    for name, module in linears.items():
        layer = module.get_base_layer() if isinstance(module, MosLoraLinear4bit) else module
        state = layer.weight.quant_state
        kinds.add(f"{state.quant_type}{', double quantisation' if state.nested else ''}")
        weight = dequantised(layer) if originals is None else originals[name]
        if weight.shape != state.shape:
            raise Refusal("C-MERGE", "not the weight that was quantised", key=name, found=tuple(weight.shape),
                          expected=tuple(state.shape))  # fmt: skip
        if isinstance(module, MosLoraLinear4bit):
            updates = [module.get_delta_weight(a) for a in module.active_adapters if a in module.lora_A]
            weight = add(weight, sum(updates)) if updates else weight
        merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        merged.weight = nn.Parameter(weight.to(layer.weight.device), requires_grad=False)
        merged.bias = layer.bias
        base.set_submodule(name, merged)
    base = model.merge_and_unload()
    if isinstance(base, PreTrainedModel) and getattr(base, "hf_quantizer", None) is not None:
        base.is_loaded_in_4bit = False
        base.hf_quantizer.remove_quantization_config(base)
    source = "the original weights" if originals is not None else "the dequantised weights"
    return base, {"merged_into": source, "quantised_for_training": "; ".join(sorted(kinds))}
