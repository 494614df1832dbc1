"""The statistics of benchmarks/mixer.py: paired differences from LoRA by seed, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llava_moslora.evaluation.compare import holm

BASELINE, LEVEL = "lora", 0.05


def report_of(arms: dict[str, dict], seeds: Sequence[int]) -> dict:
    """What of a task goes into mixer.json.

    Args:
        arms: arm → "curve" (rate, and a result for each tuning seed), the chosen "rate", "results" (one for each of
            ``seeds``). A result has "loss" (None: not finite), "accuracy", "trained_parameters". LoRA's has
            "second_rate" and "second_results" too.
    """
    losses = {arm: [result["loss"] for result in found["results"]] for arm, found in arms.items()}
    others = [arm for arm in arms if arm != BASELINE]
    compared = {arm: paired(losses[arm], losses[BASELINE]) for arm in others}
    corrected = dict(zip(others, holm([compared[arm]["p"] for arm in others]), strict=True))
    rows = {}
    for arm, found in arms.items():
        rows[arm] = {
            "trained_parameters": found["results"][0]["trained_parameters"],
            "rate": found["rate"],
            "curve": [curve_point(point) for point in found["curve"]],
            "validation_loss_at_best": validation_loss(found, 0),
            "validation_loss_over_middle_three": validation_loss(found, 1),
            "loss_by_seed": dict(zip(map(str, seeds), losses[arm], strict=True)),
            "loss": mean(losses[arm]),
            "accuracy": mean([result["accuracy"] for result in found["results"]]),
            "train_loss": mean([result["train_loss"] for result in found["results"]]),
        }
        if arm != BASELINE:
            rows[arm] |= compared[arm] | {"p_holm": corrected[arm]}
            rows[arm]["verdict"] = verdict(rows[arm])
    second = [result["loss"] for result in arms[BASELINE]["second_results"]]
    scale = {"rate": arms[BASELINE]["second_rate"], "loss": mean(second), "loss_by_seed": second}
    return {"seeds": list(seeds), "arms": rows, "lora_at_second_best_rate": scale | paired(second, losses[BASELINE])}


def curve_point(point: dict) -> dict:
    """A learning rate, the validation loss of each tuning seed and their mean."""
    losses = [result["loss"] for result in point["results"]]
    return {"rate": point["rate"], "losses": losses, "mean": mean(losses)}


def validation_loss(found: dict, around: int) -> float | None:
    """Mean over the tuning seeds, at the chosen rate and at so many of its neighbours on each side."""
    points = [curve_point(point) for point in found["curve"]]
    best = [point["rate"] for point in points].index(found["rate"])
    return mean([point["mean"] for point in points[max(0, best - around) : best + around + 1]])


def mean(values: Sequence[float | None]) -> float | None:
    """None if one is missing: a run whose loss was not finite is never silently dropped."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def paired(ours: Sequence[float | None], baseline: Sequence[float | None]) -> dict:
    """Mean of the differences, its 95 % t-interval, and p of the two-sided paired t-test.

    With a loss that is not finite there is no mean: all are None, and p is 1.
    """
    if None in ours or None in baseline:
        return {"difference": None, "interval": None, "p": 1.0}
    differences = np.subtract(ours, baseline)
    count, centre = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    half = t_quantile(1 - LEVEL / 2, count - 1) * error
    p = 2 * (1 - t_cdf(abs(centre) / error, count - 1)) if error else float(centre == 0)
    return {"difference": centre, "interval": [centre - half, centre + half], "p": p}


def t_cdf(t: float, freedom: int) -> float:
    """Student's distribution function for t ≥ 0, by the substitution t = √n·tan θ and Simpson's rule."""
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(math.pi) * math.gamma(freedom / 2))
    theta = np.linspace(0, math.atan(t / math.sqrt(freedom)), 20_001)
    heights = np.cos(theta) ** (freedom - 1)
    weights = np.ones_like(theta)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return 0.5 + scale * float(weights @ heights) * theta[1] / 3


def t_quantile(share: float, freedom: int) -> float:
    """t ≥ 0 with ``t_cdf(t) == share``, by bisection."""
    low, high = 0.0, 1e4
    while high - low > 1e-10 * max(1.0, low):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def verdict(row: dict) -> str:
    """One sentence about an arm's test loss next to LoRA's."""
    if row["interval"] is None:
        return "not comparable: a run ended in a loss that is not finite"
    low, high = row["interval"]
    if row["p_holm"] < LEVEL:
        which = "worse" if row["difference"] > 0 else "better"
        return f"{which} than LoRA: loss {row['difference']:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"
    return f"no difference above {max(abs(low), abs(high)):.4f} was seen"


def table(result: dict) -> str:
    """All tasks as text."""
    lines = []
    for task, report in result["tasks"].items():
        plan = result["plans"][task]
        lines += ["", f"{task}: {plan['steps']} steps of {plan['batch']}, {len(report['seeds'])} seeds"]
        lines.append(f"{'':20} {'rate':>8} {'loss':>8} {'accuracy':>9} {'minus LoRA':>11} {'p (Holm)':>9}")
        for arm, row in report["arms"].items():
            loss = "–" if row["loss"] is None else f"{row['loss']:.4f}"
            line = f"{arm:20} {row['rate']:8.2g} {loss:>8} {row['accuracy']:9.1%}"
            if arm != BASELINE:
                difference = "–" if row["difference"] is None else f"{row['difference']:+.4f}"
                line += f" {difference:>11} {row['p_holm']:9.3f}  {row['verdict']}"
            lines.append(line)
        scale = report["lora_at_second_best_rate"]
        difference = "–" if scale["difference"] is None else f"{scale['difference']:+.4f}"
        lines.append(f"for scale: LoRA at its second-best rate, {scale['rate']:.2g}, minus LoRA: {difference}")
    wall = f"{result['wall_seconds'] / 60:.1f} min on {result['machine']}, {result['processes']} processes"
    return "\n".join([*lines, "", wall])
