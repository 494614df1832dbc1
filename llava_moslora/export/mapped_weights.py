"""Computes the run's outputs for verification in little memory: the LLM's 16-bit weights stay memory-mapped.

A weight is converted to float32 a block of rows at a time. accelerate's disk offload computes the same numbers, but
holds whole weights in float32, each twice: with an LLM of 0.75 GB it took 0.53 GB where this takes 0.23 GB, and twice
the time (2 CPU cores); LLaMA-3-8B's embedding alone would take 4.2 GB. The export's counterpart is
``compute_in_float32`` in probe.py, which must not import this package.
"""

from __future__ import annotations

import functools
import math

import psutil
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from llava_moslora.errors import Refusal
from llava_moslora.export import probe
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.models.names import ADAPTER_NAME, part_of

OVERHEAD = 10**9  # bytes: libraries, activations, the other process


def needed(trained: TrainedRun, dtype: torch.dtype) -> bool:
    """Whether the LLM does not fit into memory in float32, so that its weights must stay in their files.

    Raises:
        Refusal: E-MEMORY, neither fits.
    """
    llm = {planned.name: math.prod(planned.shape) for planned in trained.llm_tensors()}
    rest = sum(math.prod(tensor.shape) for tensor in (*trained.vision.values(), *trained.projector.values()))
    loaded = (sum(llm.values()) + rest) * 4
    stored = trained.llm_config.dtype
    # the vision tower, one update, and copies of embedding and head if tokens were appended
    mapped = rest * 4 + max(llm.values()) * 4 + 2 * max(llm.values()) * 2
    if trained.is_internlm2:
        mapped += sum(llm.values()) * 2  # converted as it is read: no file to map
    if trained.bits == 4:
        linears = sum(count for name, count in llm.items() if name.endswith("proj.weight"))
        mapped = max(mapped, rest * 4 + linears * 0.6 + (sum(llm.values()) - linears) * 4)
    loaded, mapped = (int(need * 1.2) + OVERHEAD for need in (loaded, mapped))
    available = psutil.virtual_memory().available
    if loaded <= available:
        return False
    mappable = stored in (torch.bfloat16, torch.float16) and dtype == stored
    if mappable and mapped <= available:
        return True
    needs = ", or ".join(f"{need / 1e9:.1f} GB" for need in ([mapped, loaded] if mappable else [loaded]))
    raise Refusal(
        "E-MEMORY", "too little memory to verify the export against the run",
        found=f"{available / 1e9:.1f} GB available", expected=needs, fix="--no_proof, or export on a larger machine",
    )  # fmt: skip


def merge_where_used(model: nn.Module, dtype: torch.dtype) -> None:
    """Make ``model`` compute as if it were merged and rounded to ``dtype``: a linear layer of the LLM adds its adapter
    to one block of its weight at a time, when it is called. NF4 layers are dequantised there."""
    adapted = {module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) or (_is_4bit(module) and module not in adapted):
            if part_of(name) in ("llm", "lm_head"):
                module.forward = functools.partial(_merged_linear, module, dtype)
            elif isinstance(module, BaseTunerLayer):
                module.merge()


def _merged_linear(module: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    base, update, lengths = module, None, None
    if isinstance(module, BaseTunerLayer):
        base, update = module.get_base_layer(), module.get_delta_weight(ADAPTER_NAME)  # (out, in)
        if ADAPTER_NAME in getattr(module, "lora_magnitude_vector", ()):
            lengths = module.lora_magnitude_vector[ADAPTER_NAME].weight  # (out)
    weight = base.weight
    if _is_4bit(base):
        from llava_moslora.adapters.bnb import dequantised

        weight = dequantised(base)

    def rows(begin: int, end: int) -> Tensor:
        block = weight[begin:end].float()
        if update is not None:
            block = block + update[begin:end]
        if lengths is not None:  # DoRA's rows have their own magnitude
            block = block * (lengths[begin:end] / block.norm(dim=1))[:, None]
        return block.to(dtype).float()

    return probe.linear_by_rows(x, weight.shape, base.bias, rows)


def _is_4bit(module: nn.Module) -> bool:
    return hasattr(getattr(module, "weight", None), "quant_state")
