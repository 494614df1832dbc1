"""Step time: GPU compute, Python's launch overhead, image loading, and communication.

GPU utilisation (the share of peak FLOP/s) and Python's time per layer are taken from this package's measured rows in
benchmarks/results on an H100. For another device they are assumptions, and every estimate is a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_moslora.config import parse_recompute
from llava_moslora.devices import Device
from llava_moslora.models.flops import Flops
from llava_moslora.planning.records import Records
from llava_moslora.planning.setting import Choice, Model, Pair
from llava_moslora.planning.states import Counts

# benchmarks/results/train-nvidia-h100-80gb-hbm3*, steps of 537.6 TFLOP and 55 layers:
# - with zero1+selective kernels run for 1,086 ms a step (the profile), half of the peak, and the GPU waits for Python
#   for the rest of 1,550 ms; with zero1+none@4, half as much work, it waits too;
# - with zero1+full products run twice, which half of the peak would do in 1,630 ms of 1,997: Python's time as well.
MEASURED_ON = "H100"
SHARE_OF_PEAK = 0.5005
FORWARD_AGAIN = 0.5  # of the model's FLOPs, with --recompute full
NF4_SLOWER = 2039.54 / 1996.93  # zero1+full+4bit over zero1+full
MEASURED_LAYERS = (23, 32)  # of vision tower and LLM
PYTHON = {"none": 0.91971 / 55, "selective": 1.55035 / 55, "full": 1.99693 / 55}  # s per layer and micro-batch
# Fraction of Python's time that remains since those rows: processor time of the same steps then and now, on a CPU, with
# a device that computes nothing. Not measured on a GPU yet.
PYTHON_SINCE = {"none": 0.60, "selective": 0.44, "full": 0.65}
# benchmarks/results/data.json: images per second and core
IMAGES_PER_SECOND = {"pil": 225.8, "torch": 425.2}
HOST_LINK = 25e9  # bytes/s between host and GPU, assumed
HOST_ADAM = 1e9  # trained numbers that a host's Adam updates per second and rank, assumed
RANGE_MEASURED, RANGE_ASSUMED = (0.8, 1.3), (0.7, 1.6)  # from–to around an estimate
STEPS_DIFFER = 0.1  # a run's first steps from all of them: records differ in length; assumed


@dataclass(frozen=True)
class Duration:
    """Seconds of an optimizer step, and of the run where the number of records is known.

    Args:
        compute, python, data: of a step, of which the largest counts. communication: added.
        factors: from–to, around ``step``.
        steps: of the run; None where it is not known.
        tokens_per_second: of all GPUs.
    """

    compute: float
    python: float
    data: float
    communication: float
    factors: tuple[float, float]
    steps: int | None
    tokens_per_second: float
    mfu: float

    @property
    def step(self) -> float:
        return max(self.compute, self.python, self.data) + self.communication

    @property
    def hours(self) -> tuple[float, float] | None:
        if self.steps is None:
            return None
        low, high = (self.steps * self.step * factor / 3600 for factor in self.factors)
        return low, high

    @property
    def limit(self) -> str:
        """The bottleneck of the step."""
        parts = {"the GPU": self.compute, "Python": self.python, "images": self.data}
        slowest = max(parts, key=lambda name: parts[name])
        return "communication" if self.communication > parts[slowest] else slowest


def duration(
    model: Model, counts: Counts, choice: Choice, records: Records, device: Device, gpus: int,
    *, steps: int | None, workers: int, image_engine: str, factors: tuple[float, float],
) -> Duration:  # fmt: skip
    """
    Args:
        steps: optimizer steps of the run, None where unknown.
        workers: processes that read images, per GPU.
        factors: from–to, see :func:`factors_of`.
    """
    per: Flops = counts.flops
    flops = choice.micro_batch * records.flops(per)
    mode, n = parse_recompute(choice.recompute)
    again = FORWARD_AGAIN / n if mode == "full" else 0
    compute = flops * (1 + again) / (SHARE_OF_PEAK * device.flops)
    python = _python(mode, n, model.tower_layers, model.llm_config.num_hidden_layers)
    if choice.bits == 4:
        compute, python = NF4_SLOWER * compute, NF4_SLOWER * python
    images = choice.micro_batch * records.images
    data = images / (max(workers, 1) * IMAGES_PER_SECOND[image_engine])
    micro_batches = choice.accumulation
    communication = _communication(model, counts, choice, device, gpus, mode)
    step = max(compute, python, data) * micro_batches + communication
    in_step = choice.micro_batch * micro_batches * gpus
    return Duration(
        compute=compute * micro_batches,
        python=python * micro_batches,
        data=data * micro_batches,
        communication=communication,
        factors=factors,
        steps=steps,
        tokens_per_second=in_step * records.tokens / step,
        mfu=in_step * records.flops(per) / step / (device.flops * gpus),
    )


def _python(mode: str, n: int, tower_layers: int, llm_layers: int) -> float:
    """Seconds that Python needs for a micro-batch. Selective recomputation leaves the tower alone: what the measured
    row needs more than ``none`` is its LLM's."""
    now = {way: PYTHON[way] * PYTHON_SINCE[way] for way in PYTHON}
    none = now["none"] * (tower_layers + llm_layers)
    if mode == "selective":
        return none + (now["selective"] - now["none"]) * sum(MEASURED_LAYERS) / MEASURED_LAYERS[1] * llm_layers
    return none + (now[mode] - now["none"]) * (tower_layers + llm_layers) / max(n, 1)


def factors_of(device_name: str, choice: Choice, pairs: Sequence[Pair]) -> tuple[float, float]:
    """From–to around an estimate: as runs on such a GPU have shown, those with the same recomputation and precision if
    there are any, give or take ``STEPS_DIFFER``; else as assumed."""
    alike = [pair for pair in pairs if (pair.recompute, pair.bits) == (choice.recompute, choice.bits)] or pairs
    if alike:
        times = [pair.time for pair in alike]
        return (1 - STEPS_DIFFER) * min(times), (1 + STEPS_DIFFER) * max(times)
    return RANGE_MEASURED if device_name == MEASURED_ON else RANGE_ASSUMED


def _communication(model: Model, counts: Counts, choice: Choice, device: Device, gpus: int, mode: str) -> float:
    """Seconds of a step, s bytes a number, A trained, F frozen, N GPUs; each collective moves (N − 1)/N of its data.

    Gradients: all-reduced once a step, 2·s·A, or under stages 2 and 3 reduced with every micro-batch, s·A; weights
    gathered once a step, s·A. Stage 3: the frozen weights for forward and backward of every micro-batch, and once more
    where forward is computed again, s·F each. Offloaded: gradients and weights of a rank's share over the host's link,
    16-bit, and Adam on the host; with parameters, all that is gathered comes over that link.
    """
    zero, a, f, s = choice.zero, counts.trained, counts.frozen, model.dtype.itemsize
    share = (gpus - 1) / gpus
    reduced = s * a * (choice.accumulation if zero.stage in (2, 3) else 2)
    seconds = share * (reduced + s * a) / device.link
    if zero.stage == 3:
        gathered = (3 if mode != "none" else 2) * s * f * choice.accumulation
        seconds += share * gathered / device.link
        if zero.offload_parameters:
            seconds += gathered / gpus / HOST_LINK
    if zero.offload_optimizer and zero.stage:
        seconds += 2 * s * a / gpus / HOST_LINK + a / gpus / HOST_ADAM
    return seconds
