"""After an out-of-memory error in training: what the planner would change, with flags to paste."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llava_moslora.adapters.methods import METHODS
from llava_moslora.devices import GIB
from llava_moslora.errors import Refusal
from llava_moslora.planning.plan import Plan
from llava_moslora.planning.suggest import as_flags, suggest

LESS = 0.9  # of the memory that was planned for the setting that ran out of memory


@contextmanager
def advice_where_memory_ends(make_plan: Callable[[], Plan | None]) -> Iterator[None]:
    """Wraps training: the refusal for :class:`torch.OutOfMemoryError` also names the planner's flags.

    Args:
        make_plan: of the training; None where there is none. Called only then, on the rank that ran out of memory.
    """
    try:
        yield
    except Refusal as refusal:
        if not isinstance(refusal.__cause__, torch.OutOfMemoryError):
            raise
        plan = make_plan()
        if plan is None:
            raise
        parts = {name: getattr(refusal, name) for name in ("key", "found", "expected")}
        fix = f"{less_memory(plan)}; scripts/plan.py shows what needs the memory"
        raise Refusal(refusal.code, refusal.what, **parts, fix=fix) from refusal.__cause__


def less_memory(plan: Plan) -> str:
    """The fastest setting with the same global batch whose planned peak is clearly below that of ``plan``."""
    request, most = plan.request, LESS * plan.memory.peak
    found = suggest(
        request.choice, request.zeros, request.gpus,
        fits=lambda choice: request.memory(choice).peak <= most and request.fits(choice),
        seconds=lambda choice: request.duration(choice).step, alternatives=0,
        nf4=not METHODS[request.model.adapter.method].not_over_nf4,
    )  # fmt: skip
    if not found:
        return "no equivalent setting needs less: use more GPUs, zero_configs/zero3.json, or less --model_max_length"
    peak = request.memory(found[0].choice).peak
    return f"{as_flags(found[0].choice)} (planned {peak / GIB:.1f} GiB, now {plan.memory.peak / GIB:.1f})"
