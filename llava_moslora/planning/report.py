"""A plan as text for a terminal, as one line, and as JSON."""

from __future__ import annotations

from typing import Any

from llava_moslora.devices import GIB
from llava_moslora.planning.duration import MEASURED_ON
from llava_moslora.planning.memory import Memory
from llava_moslora.planning.plan import Plan
from llava_moslora.planning.suggest import as_flags

BAR = 28  # characters of a bar that is as long as the card's memory
GB = 1e9
PEAK = "peak of torch's allocator"
FITS, DOES_NOT_FIT, CANNOT_SAY = 0, 6, 7
FITS_WORDS = {True: "fits", False: "does not fit", None: "may not fit"}


def exit_status(plan: Plan) -> int:
    return CANNOT_SAY if plan.fits is None else FITS if plan.fits else DOES_NOT_FIT


def verdict(plan: Plan) -> str:
    """One line: does it fit, how much of the card, how long, where the GPU's speed is known."""
    request = plan.request
    card = f"{request.gpus} × {request.stands_for or request.device_name} with {request.capacity / GIB:.1f} GiB"
    time = "speed unknown" if request.stands_for else _time(plan)
    return f"{FITS_WORDS[plan.fits]} on {card}: {_range(plan.memory)} a GPU, {time}"


def chosen(plan: Plan) -> str:
    """One line about ``--recompute auto``: the chosen mode, its memory, and what the next faster one needs."""
    request, used = plan.request, plan.memory
    way, capacity = request.choice.recompute, f"{request.capacity / GIB:.1f} GiB"
    needs = f"planned {_range(used)} of the GPU's {capacity}"
    if plan.fits is not True:
        needs = f"because no mode certainly fits; {needs}"
    if plan.faster is None:
        return f"--recompute auto: {way}, {needs}; no mode is faster"
    faster = request.memory(plan.faster)
    does_not = FITS_WORDS[faster.fits(request.capacity)]
    return f"--recompute auto: {way}, {needs}; {plan.faster.recompute}, the next faster, {does_not}: {_range(faster)}"


def _range(used: Memory) -> str:
    return f"{used.low / GIB:.1f} to {used.high / GIB:.1f} GiB"


def text(plan: Plan, *, suggested: bool) -> str:
    """The table, with a bar for each part as a share of the card."""
    request, used = plan.request, plan.memory
    lines = [verdict(plan), *([chosen(plan)] if plan.auto else []), "", f"memory of one GPU{'GiB':>26}"]
    for part in used.parts:
        bar = "█" * round(BAR * part.size / request.capacity)
        lines.append(f"  {part.name:<34}{part.size / GIB:>7.2f}  {bar:<{BAR}}  {part.source}")
    whole = "█" * round(BAR * min(1, used.peak / request.capacity))
    lines += [
        f"  {PEAK:<34}{used.peak / GIB:>7.2f}  {whole:<{BAR}}  the sum",
        f"  total on the GPU: {used.low / GIB:.1f} to {used.high / GIB:.1f} (CUDA's context, fragmentation: "
        f"{'as measured' if request.pairs else 'assumed'})",
        f"  largest micro-batch that fits: {plan.largest or 'none'} (asked for: {request.choice.micro_batch})",
    ]
    batch, records = request.batch(request.choice), request.records
    lines += [
        f"largest micro-batch: {batch.rows} × {batch.tokens} tokens, {batch.images} images, {batch.labels} labels "
        f"({records.source})",
        f"mean record: {records.tokens:.0f} tokens, {records.images:.2g} images, {records.labels:.0f} labels",
        "",
        *_time_lines(plan),
        "",
        "disk: " + ", ".join(f"{name} {size / GB:.1f} GB" for name, size in plan.disk.items()),
        "host memory: " + ", ".join(f"{name} {size / GB:.1f} GB" for name, size in plan.host.items() if size),
    ]
    if suggested:
        lines += ["", *_suggestion_lines(plan)]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """Sizes in bytes, times in seconds."""
    used, time, request = plan.memory, plan.duration, plan.request
    return {
        "verdict": verdict(plan),
        "fits": plan.fits,
        "gpu": request.device_name,
        "gpus": request.gpus,
        "recompute": request.choice.recompute,
        "chosen": chosen(plan) if plan.auto else None,
        "capacity": round(request.capacity),
        "memory": {part.name: part.size for part in used.parts},
        "peak": used.peak,
        "device": [used.low, used.high],
        "largest_micro_batch": plan.largest,
        "step_seconds": [time.step * factor for factor in time.factors],
        "tokens_per_second": time.tokens_per_second,
        "mfu": time.mfu,
        "limit": time.limit,
        "steps": time.steps,
        "hours": time.hours,
        "disk": plan.disk,
        "host": plan.host,
        "records": request.records.source,
        "suggestions": [
            {"flags": as_flags(c.choice), "step_seconds": c.seconds, "peak": request.memory(c.choice).peak}
            for c in plan.suggestions
        ],
    }


def _time(plan: Plan) -> str:
    low, high = (plan.duration.step * factor for factor in plan.duration.factors)
    if plan.duration.hours is None:
        return f"{low:.2g} to {high:.2g} s a step"
    return f"{_hours(plan.duration.hours)} for {plan.duration.steps:,} steps"


def _hours(hours: tuple[float, float]) -> str:
    return " to ".join(f"{h:.1f}" if h >= 1 else f"{h:.2f}" for h in hours) + " h"


def _time_lines(plan: Plan) -> list[str]:
    time, request = plan.duration, plan.request
    measured = request.device_name == MEASURED_ON
    source = "measured on one H100" if measured else "assumed, from one H100's"
    if request.pairs:
        source = f"as in {', '.join(pair.run for pair in request.pairs)}"
    lines = [
        f"a step: {time.step:.2f} s (× {time.factors[0]} to {time.factors[1]}), waiting for {time.limit}: GPU "
        f"{time.compute:.2f}, Python {time.python:.2f}, images {time.data:.2f}, communication {time.communication:.2f}",
        f"{time.tokens_per_second:,.0f} tokens/s on {request.gpus} GPUs, MFU {time.mfu:.2f}; {source}",
    ]
    if time.hours is None:
        return [*lines, "the run: unknown number of records; give --records, or prepare the data"]
    return [*lines, f"the run: {time.steps:,} steps, {_hours(time.hours)}"]


def _suggestion_lines(plan: Plan) -> list[str]:
    if not plan.suggestions:
        return ["no equivalent setting fits: use more GPUs, a smaller --model_max_length, or a smaller rank"]
    lines = ["fastest that fits, with the same global batch:"]
    for candidate in plan.suggestions:
        used = plan.request.memory(candidate.choice)
        lines.append(
            f"  {candidate.seconds:.2f} s a step, peak {used.peak / GIB:.1f} GiB: {as_flags(candidate.choice)}"
        )
    if plan.suggestions[0].choice.bits != plan.request.choice.bits:
        lines.append("  nothing fits in 16 bits; NF4 rounds weights, so losses differ")
    return lines
