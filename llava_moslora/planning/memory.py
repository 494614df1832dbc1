"""Memory of one GPU by part, its total, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_moslora.devices import GIB, Device
from llava_moslora.planning.activations import activations
from llava_moslora.planning.setting import Batch, Choice, Model, Pair
from llava_moslora.planning.states import ADAM_BYTES, States, count, states

# GPU memory of a process outside torch's allocator: the CUDA context with its kernels, and NCCL's buffers if there are
# several ranks. Assumed, in GiB, from and to.
CONTEXT = (0.5, 1.0)
NCCL = (0.2, 0.8)
# torch's allocator reserves more than it has allocated: on an H100 with expandable segments 0.9 to 2.3 % of the peak
# (benchmarks/results); without them some per cent more, from fragmentation.
RESERVED = (1.0, 1.03)
# The estimate of the allocator's peak is above what was measured, by at most this share (docs/planning.md).
ABOVE = 0.08


@dataclass(frozen=True)
class Part:
    """A row of the table: bytes, and their source: counted, measured on meta, or assumed."""

    name: str
    size: int
    source: str


@dataclass(frozen=True)
class Memory:
    """One GPU's memory.

    Args:
        parts: alive at the peak; their sum is ``peak``.
        peak: of torch's allocator, bytes: at most what is allocated at a time.
        low, high: of the whole GPU, as its driver reports it, bytes.
        host: offloaded states of one rank, bytes.
    """

    parts: tuple[Part, ...]
    peak: int
    low: int
    high: int
    host: int

    def fits(self, capacity: float) -> bool | None:
        """Whether it fits ``capacity`` bytes; None where it may or may not."""
        return True if self.high <= capacity else False if self.low > capacity else None

    def as_seen(self, pairs: Sequence[Pair]) -> Memory:
        """With the range that runs on such a GPU have shown in place of the assumed one: the allocator's share, give or
        take what fragmentation differs by, and what is outside of it."""
        if not pairs:
            return self
        shares, outside = [pair.memory for pair in pairs], [pair.outside for pair in pairs]
        low = round(self.peak * min(shares) / RESERVED[1] + min(outside))
        return replace(self, low=low, high=round(self.peak * max(shares) * RESERVED[1] + max(outside)))


def memory(
    model: Model, choice: Choice, batch: Batch, device: Device, gpus: int, state_bytes: int | None = ADAM_BYTES
) -> Memory:
    """The peak is the larger of two moments: in forward and backward, with activations and temporaries, and in the
    optimizer's step, with float32 gradients and no activations.

    Args:
        batch: the largest micro-batch.
        gpus: N, ranks.
        state_bytes: of the optimizer, per trained number, or ``states.FACTORED``.
    """
    model = model.variant(choice.bits, choice.zero.stage == 3)
    s = states(count(model), choice.zero, gpus, model.dtype.itemsize, state_bytes)
    a = activations(model, choice.recompute, batch)
    parts = _state_parts(s, model, choice)
    if (in_batch := a.inputs + a.kept + a.working) >= s.in_step:
        measured = "measured on meta"
        parts += [
            Part("batch", a.inputs, "counted"),
            Part("saved by the vision tower", a.tower, measured),
            Part("saved by the projector", a.projector, measured),
            Part("saved by the LLM's layers", a.llm, measured),
            Part(_working_name(a), a.working, measured),
        ]
        assert sum(part.size for part in parts[-5:]) == in_batch
    else:
        parts.append(Part("gradients in float32, in the step", s.in_step, "counted"))
    parts.append(Part("workspaces of cuBLAS", _workspaces(device), "counted"))
    peak = sum(part.size for part in parts)
    context = [c + (n if gpus > 1 else 0) for c, n in zip(CONTEXT, NCCL, strict=True)]
    low = round(peak * RESERVED[0] / (1 + ABOVE) + context[0] * GIB)
    high = round(peak * RESERVED[1] + context[1] * GIB)
    return Memory(tuple(part for part in parts if part.size), peak, low, high, s.host)


def _state_parts(s: States, model: Model, choice: Choice) -> list[Part]:
    stage = "" if choice.zero.stage is None else f", ZeRO-{choice.zero.stage}"
    bits = 8 * model.dtype.itemsize
    return [
        Part(f"frozen weights, {bits} bits", s.frozen, "counted"),
        Part("frozen weights, NF4", s.nf4, "counted"),
        Part(f"trained weights, {bits} bits", s.trained, "counted"),
        Part("float32 master weights" + stage, s.masters, "counted"),
        Part("optimizer state" + stage, s.moments, "counted"),
        Part("gradients" + stage, s.gradients, "counted"),
        Part("communication and gathered weights", s.buffers, "counted"),
    ]


def _working_name(a) -> str:
    if a.working == a.in_loss:
        return "the loss"
    return "backward of a layer" if a.working == a.in_layer else "backward of the vision tower"


def _workspaces(device: Device) -> int:
    """One per thread that multiplies matrices, which forward and backward each do in one: 32 MiB on compute capability
    9.0, else 8 MiB and 128 KiB (torch's ``CUDABlas``, its default)."""
    return 2 * (32 * 2**20 if device.capability == (9, 0) else 8 * 2**20 + 128 * 2**10)
