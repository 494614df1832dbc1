"""Weights, gradients and optimizer state on one GPU and on the host, counted from the model's own parameters.

Symbols: N ranks, F frozen numbers, A trained numbers, s bytes of a number in the model's dtype (2 in 16 bits).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from peft import PeftModel
from torch import nn

from llava_moslora.models.assemble import model_on_meta
from llava_moslora.models.flops import Flops
from llava_moslora.models.names import adapter_tensor
from llava_moslora.planning.setting import Model, Zero

ADAM_BYTES = 8
FACTORED = None  # Adafactor's (Shazeer and Stern 2018): two float32 vectors for a matrix
# --optim → bytes of its state per trained number
STATE_BYTES = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), ADAM_BYTES),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop", "rmsprop_bnb_32bit"), 4),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), 2),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit"), 1),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), 12),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), 3),
    "sgd": 0,
    "adafactor": FACTORED,
}
NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256  # numbers that share a scale, scales that share one


@dataclass(frozen=True)
class Counts:
    """Numbers in the parameters of a model.

    Args:
        frozen: that are kept in the model's dtype, of all parts.
        nf4: (numbers, ...) of each weight that is kept in NF4.
        trained: of adapters and projector. factored: of Adafactor's state for them.
        merged: of the model that an export writes: no adapters, and not the original projector, which PEFT keeps next
            to the trained copy.
        sizes: of each parameter that is not in NF4: ZeRO-3 does not partition small ones.
    """

    frozen: int
    nf4: tuple[int, ...]
    trained: int
    factored: int
    merged: int
    sizes: tuple[int, ...]
    flops: Flops


@lru_cache(maxsize=64)
def count(model: Model) -> Counts:
    """From the whole model on the meta device; takes a second."""
    if model.partitioned:  # the same numbers
        return count(model.variant(model.bits, False))
    whole = model_on_meta(model.llm_config, model.vision_config, model.adapter, model.dtype)
    inner = whole.get_base_model() if isinstance(whole, PeftModel) else whole
    llm = getattr(inner.model, "language_model", inner.model)  # of an LLM alone, the model itself
    in_nf4 = _quantised(llm) if model.bits == 4 else {}
    frozen = [p for p in whole.parameters() if not p.requires_grad and id(p) not in in_nf4]
    trained = [p for p in whole.parameters() if p.requires_grad]
    named = whole.named_parameters()
    return Counts(
        frozen=sum(p.numel() for p in frozen),
        nf4=tuple(in_nf4.values()),
        trained=sum(p.numel() for p in trained),
        factored=sum(p.numel() if p.ndim < 2 else sum(p.numel() // n for n in p.shape[-2:]) for p in trained),
        merged=sum(p.numel() for name, p in named if not (adapter_tensor(name) or "original_module" in name)),
        sizes=tuple(p.numel() for p in whole.parameters() if id(p) not in in_nf4),
        flops=Flops.of(whole),
    )


def _quantised(llm: nn.Module) -> dict[int, int]:
    """Weights that ``models.llm.load_llm`` quantises, all linear layers except adapters: id → number of elements."""
    adapters = {id(m) for parent in llm.modules() if isinstance(parent, nn.ModuleDict) for m in parent.modules()}
    linears = [m for m in llm.modules() if isinstance(m, nn.Linear) and id(m) not in adapters]
    return {id(linear.weight): linear.weight.numel() for linear in linears}


def nf4_bytes(numbers: int) -> int:
    """Of one NF4 weight with double quantisation (Dettmers et al. 2023, as bitsandbytes 0.50 stores it): half a byte a
    number, a scale of one byte per 64, a float32 per 256 of those, their table of 256 float32, the 16 values, an
    offset."""
    scales = math.ceil(numbers / NF4_BLOCK)
    return math.ceil(numbers / 2) + scales + 4 * math.ceil(scales / NF4_OUTER_BLOCK) + 4 * 256 + 4 * 16 + 4


@dataclass(frozen=True)
class States:
    """Bytes on one GPU, and those of all ranks of one host together.

    Args:
        frozen, nf4: weights that are not trained.
        trained: weights that are, in the model's dtype.
        masters, moments: float32 copies of those, optimizer state.
        gradients: kept until the optimizer's step.
        buffers: for communication, and what ZeRO-3 gathers.
        in_step: peak beyond all others in the optimizer's step, when no activation is alive.
        host: offloaded, pinned.
    """

    frozen: int
    nf4: int
    trained: int
    masters: int
    moments: int
    gradients: int
    buffers: int
    in_step: int
    host: int

    @property
    def total(self) -> int:
        return self.frozen + self.nf4 + self.trained + self.masters + self.moments + self.gradients + self.buffers


def states(counts: Counts, zero: Zero, gpus: int, item: int = 2, state_bytes: int | None = ADAM_BYTES) -> States:
    """By ZeRO stage (DeepSpeed 0.19.8; Rajbhandari et al. 2020), A = ``counts.trained``, s = ``item``:

    - without DeepSpeed: gradients s·A, no masters, moments 8·A.
    - stage 0: gradients s·A, masters 4·A, moments 8·A; in the step gradients once more in float32.
    - stage 1 with gradients summed in float32: masters 4·A/N, moments 8·A/N, gradients 4·A on every rank.
    - stage 1 otherwise: gradients s·A; stage 2: s·A/N; masters 4·A/N, moments 8·A/N; one bucket for reduction, two
      where communication overlaps; in the step gradients once more in float32, 4·A/N.
    - stage 3: as 2, one bucket; s·(F + A)/N of the weights; gathered at most ``live`` and ``prefetch`` numbers.
    - offloaded: masters, moments and float32 gradients, 16·A/N, on the host, in place of GPU; weights too with stage 3.

    Args:
        gpus: N.
        item: s.
        state_bytes: per trained number, 8 for Adam; :data:`FACTORED`.
    """
    a, f, n, stage = counts.trained, counts.frozen, gpus, zero.stage
    share = n if stage else 1
    masters = 0 if stage is None else math.ceil(4 * a / share)
    moments = math.ceil((4 * counts.factored if state_bytes is FACTORED else state_bytes * a) / share)
    frozen, trained = item * f, item * a
    gradients, in_step, buffers, host = item * a, 4 * a if stage == 0 else 0, 0, 0
    if stage == 1 and zero.fp32_gradients:
        gradients = 4 * a
    elif stage in (1, 2, 3):
        gradients = item * a if stage == 1 else math.ceil(item * a / n)
        in_step = math.ceil(4 * a / n)
        buffers = item * zero.bucket * (2 if zero.overlap and stage != 3 else 1)
    if stage == 3:
        whole = sum(size for size in counts.sizes if size <= zero.persistent)
        frozen, trained = math.ceil(item * (f - min(whole, f)) / n) + item * min(whole, f), math.ceil(item * a / n)
        buffers += item * min(zero.live + zero.prefetch, f + a)
        if zero.offload_parameters:
            host += frozen + trained
            frozen = trained = 0
    if zero.offload_optimizer and stage:
        host += masters + moments + in_step
        masters = moments = in_step = gradients = 0
    return States(frozen, sum(map(nf4_bytes, counts.nf4)), trained, masters, moments, gradients, buffers, in_step, host)
