"""The fastest setting that fits, among equivalent ones: the same global batch, the same records per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llava_moslora.planning.setting import Choice, Zero

RECOMPUTE = ("none", "every:4", "every:2", "selective", "full")


@dataclass(frozen=True)
class Candidate:
    """A setting that fits, and the seconds of its optimizer step."""

    choice: Choice
    seconds: float


def micro_batches(global_batch: int, gpus: int) -> list[int]:
    """Records per GPU that make up ``global_batch`` with a whole number of micro-batches, smallest first."""
    per_gpu = global_batch // gpus
    assert per_gpu * gpus == global_batch, "the global batch is divided over the GPUs before a plan is made"
    return [n for n in range(1, per_gpu + 1) if per_gpu % n == 0]


def suggest(
    now: Choice,
    zeros: Sequence[tuple[str | None, Zero]],
    gpus: int,
    fits: Callable[[Choice], bool],
    seconds: Callable[[Choice], float],
    alternatives: int = 3,
    *,
    nf4: bool = True,
) -> list[Candidate]:
    """The fastest setting that fits, and the next ones with other values of ``--recompute``; in a tie the smaller
    micro-batch, and then the first in ``zeros``.

    For each value of ``--recompute`` and each DeepSpeed file the largest micro-batch that fits is found by bisection,
    because memory grows monotonically with it; smaller ones are used only if they are not slower. NF4, which changes
    the result, is tried only if nothing fits in 16 bits.

    Args:
        now: the setting of the flags; its global batch is kept.
        zeros: DeepSpeed files to choose from, with what they say.
        fits: whether a setting certainly fits.
        seconds: of an optimizer step.
        nf4: whether the method can be trained over NF4 weights.
    """
    global_batch = now.micro_batch * now.accumulation * gpus
    sizes = micro_batches(global_batch, gpus)
    for bits in dict.fromkeys((now.bits, 4) if nf4 else (now.bits,)):
        best: dict[str, Candidate | None] = {}
        for file, zero in zeros:
            if bits == 4 and zero.stage == 3:
                continue  # NF4 weights are not partitioned: there is nothing to gain
            for recompute in RECOMPUTE:
                choices = [
                    replace(now, micro_batch=n, accumulation=global_batch // gpus // n, recompute=recompute, bits=bits,
                            zero=zero, zero_file=file)
                    for n in sizes
                ]  # fmt: skip
                fitting = choices[: _count_fitting(choices, fits)]
                timed = [Candidate(choice, seconds(choice)) for choice in fitting]
                best[recompute] = min([*filter(None, [best.get(recompute)]), *timed], key=_order, default=None)
        if found := sorted(filter(None, best.values()), key=_order):
            return found[: 1 + alternatives]
    return []


def fastest_recompute(
    now: Choice, fits: Callable[[Choice], bool], seconds: Callable[[Choice], float]
) -> tuple[Choice, Choice | None]:
    """``now`` with the fastest ``--recompute`` that fits, or full if none does; and with the next faster one, which
    does not fit, or None. In a tie the first in ``RECOMPUTE`` comes first.

    Args:
        fits, seconds: as for :func:`suggest`.
    """
    ways = sorted((replace(now, recompute=recompute) for recompute in RECOMPUTE), key=seconds)
    full = [choice.recompute for choice in ways].index("full")
    at = next((number for number, choice in enumerate(ways) if fits(choice)), full)
    faster = [way for way in ways[:at] if seconds(way) < seconds(ways[at])]
    return ways[at], faster[-1] if faster else None


def _order(candidate: Candidate) -> tuple[float, int]:
    return candidate.seconds, candidate.choice.micro_batch


def _count_fitting(choices: Sequence[Choice], fits: Callable[[Choice], bool]) -> int:
    """How many of ``choices``, by growing micro-batch, fit."""
    low, high = 0, len(choices)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(choices[middle - 1]) else (low, middle - 1)
    return low


def largest_micro_batch(now: Choice, fits: Callable[[Choice], bool], most: int = 4096) -> int:
    """The largest number of records per GPU with which ``now`` fits, whatever the global batch; 0 if none does."""
    low, high = 0, 1
    while high <= most and fits(replace(now, micro_batch=high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(now, micro_batch=middle)) else (low, middle)
    return low


def as_flags(choice: Choice) -> str:
    """``choice`` as flags of scripts/train_vit_llm.py, ready to paste."""
    flags = f"--per_device_train_batch_size {choice.micro_batch} --gradient_accumulation_steps {choice.accumulation}"
    flags += f" --recompute {choice.recompute} --bits {choice.bits}"
    return flags + (f" --deepspeed {choice.zero_file}" if choice.zero_file else "")
