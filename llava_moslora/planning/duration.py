"""How long a step takes: what the GPU computes, what Python needs to ask for it, the data path, and communication.

Nothing here is computed from first principles that was not measured: the share of a GPU's peak that a step reaches, and
the time that Python needs per layer, are those of this package's rows in benchmarks/results on an H100. For another
device they are assumptions, and every figure is a range.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_moslora.devices import Device
from llava_moslora.models.flops import Flops
from llava_moslora.planning.records import Records
from llava_moslora.planning.setting import Choice, Model
from llava_moslora.planning.states import Counts
from llava_moslora.recompute import parse_recompute

# benchmarks/results/train-nvidia-h100-80gb-hbm3*: model FLOPs over peak while kernels run. Without recomputation of
# products: 537.6 TFLOP in 1,086 ms of kernels (the profile). With it, the whole step of zero1+full: MFU 0.272.
MEASURED_ON = "H100"
SHARE_OF_PEAK = {"none": 0.5005, "selective": 0.5005, "full": 0.2722}
NF4_SLOWER = 2039.54 / 1996.93  # zero1+full+4bit over zero1+full
# Seconds per layer of both towers and micro-batch, below which the GPU waits for Python: steps that waited, over their
# 55 layers. Full recomputation runs the forward again: a third more than none, which is not measured.
PYTHON = {"none": 0.91971 / 55, "selective": 1.55035 / 55, "full": 0.91971 / 55 * 4 / 3}
# benchmarks/results/data.json: images per second and core
IMAGES_PER_SECOND = {"pil": 225.8, "torch": 425.2}
HOST_LINK = 25e9  # bytes/s between host and GPU, assumed
HOST_ADAM = 1e9  # trained numbers that a host's Adam updates per second and rank, assumed
RANGE_MEASURED, RANGE_ASSUMED = (0.85, 1.15), (0.7, 1.6)


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
        """What the step waits for most."""
        parts = {"the GPU": self.compute, "Python": self.python, "images": self.data}
        slowest = max(parts, key=lambda name: parts[name])
        return "communication" if self.communication > parts[slowest] else slowest


def duration(
    model: Model, counts: Counts, choice: Choice, records: Records, device: Device, gpus: int,
    *, steps: int | None, workers: int, image_engine: str, measured: bool,
) -> Duration:  # fmt: skip
    """
    Args:
        steps: optimizer steps of the run, None where unknown.
        workers: processes that read images, per GPU.
        measured: the device is the one that was measured.
    """
    per: Flops = counts.flops
    flops = choice.micro_batch * records.flops(per)
    layers = model.tower_layers + model.llm_config.num_hidden_layers
    mode, n = parse_recompute(choice.recompute)
    seconds = {m: flops / (share * device.flops) for m, share in SHARE_OF_PEAK.items()}
    python = {m: layers * value for m, value in PYTHON.items()}
    compute, host = seconds[mode], python[mode]
    if mode == "full" and n > 1:
        compute, host = ((values["full"] + (n - 1) * values["none"]) / n for values in (seconds, python))
    if choice.bits == 4:
        compute *= NF4_SLOWER
    images = choice.micro_batch * records.images
    data = images / (max(workers, 1) * IMAGES_PER_SECOND[image_engine])
    micro_batches = choice.accumulation
    communication = _communication(model, counts, choice, device, gpus, mode)
    step = max(compute, host, data) * micro_batches + communication
    in_step = choice.micro_batch * micro_batches * gpus
    return Duration(
        compute=compute * micro_batches,
        python=host * micro_batches,
        data=data * micro_batches,
        communication=communication,
        factors=RANGE_MEASURED if measured else RANGE_ASSUMED,
        steps=steps,
        tokens_per_second=in_step * records.tokens / step,
        mfu=in_step * records.flops(per) / step / (device.flops * gpus),
    )


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
