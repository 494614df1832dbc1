"""The run's side of a proof where memory is short: the LLM computed from 16-bit weights that stay in their files.

The export's side, ``compute_in_float32``, is in probe.py, which must do without this package.
"""

from __future__ import annotations

import functools

import psutil
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from llava_moslora.errors import Refusal
from llava_moslora.export import probe
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.files.json import read_json
from llava_moslora.models.names import ADAPTER_NAME, part_of

OVERHEAD = 10**9  # bytes: libraries, activations, the other process


def needed(trained: TrainedRun, dtype: torch.dtype) -> bool:
    """How the LLM is computed in float32: held in it (False), or where that does not fit, with its 16-bit weights left
    in their files, mapped, and brought to float32 block by block (True): slower, and the same sums.

    Raises:
        Refusal: E-MEMORY, neither fits.
    """
    llm = {planned.name: torch.Size(planned.shape).numel() for planned in trained.llm_tensors()}
    rest = sum(tensor.numel() for tensor in (*trained.vision.values(), *trained.projector.values()))
    whole = (sum(llm.values()) + rest) * 4
    stored = trained.llm_config.dtype
    # the tower, one update, and copies of embedding and head where tokens were appended
    lean = rest * 4 + max(llm.values()) * 4 + 2 * max(llm.values()) * 2
    if trained.llm_config.model_type != read_json(trained.llm_folder / "config.json").get("model_type"):
        lean += sum(llm.values()) * 2  # converted as it is read: no file to map
    if trained.bits == 4:
        linears = sum(count for name, count in llm.items() if name.endswith("proj.weight"))
        lean = max(lean, rest * 4 + linears * 0.6 + (sum(llm.values()) - linears) * 4)
    whole, lean = (int(need * 1.2) + OVERHEAD for need in (whole, lean))
    available = psutil.virtual_memory().available
    if whole <= available:
        return False
    mappable = stored in (torch.bfloat16, torch.float16) and dtype == stored
    if mappable and lean <= available:
        return True
    needs = ", or ".join(f"{need / 1e9:.1f} GB" for need in ([lean, whole] if mappable else [whole]))
    raise Refusal(
        "E-MEMORY", "too little memory to prove that the export computes what the run computes",
        found=f"{available / 1e9:.1f} GB available", expected=needs, fix="--no_proof, or export on a larger machine",
    )  # fmt: skip


def merge_where_used(model: nn.Module, dtype: torch.dtype) -> None:
    """A model that computes as if it were merged and rounded to ``dtype``: the LLM's linears add their updates to a
    block of the weight at a time, when they are used. Linears in NF4 are dequantised there."""
    wrapped = {module.get_base_layer() for module in model.modules() if isinstance(module, LoraLayer)}
    for name, module in model.named_modules():
        adapted = isinstance(module, LoraLayer)
        if not adapted and (module in wrapped or not _is_4bit(module)):
            continue
        if part_of(name) in ("llm", "lm_head"):
            module.forward = functools.partial(_merged_linear, module, dtype)
        elif adapted:
            module.merge()


def _merged_linear(module: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    base, update = module, None
    if isinstance(module, LoraLayer):
        base, update = module.get_base_layer(), module.get_delta_weight(ADAPTER_NAME)  # (out, in)
    weight = base.weight
    if _is_4bit(base):
        from llava_moslora.adapters.bnb import dequantised

        weight = dequantised(base)

    def rows(begin: int, end: int) -> Tensor:
        block = weight[begin:end].float()
        return (block if update is None else block + update[begin:end]).to(dtype).float()

    return probe.by_rows(x, weight.shape, base.bias, rows)


def _is_4bit(module: nn.Module) -> bool:
    return hasattr(getattr(module, "weight", None), "quant_state")
