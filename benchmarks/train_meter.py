"""The callback that times every step of a run of benchmarks/train.py, this package's or stock, and profiles some."""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.autograd import DeviceType
from train_row import PROFILED, Job, write_result
from transformers import Trainer, TrainerCallback

from llava_moslora.training.throughput import Throughput

GIB = 2**30
LISTED_KERNELS = 40  # of a profile, the slowest
# first match counts; kernels' names as cuBLAS, cuDNN, ATen, Triton and NCCL have them
GROUPS = {
    "attention": r"fmha|flash|attention|sdpa",
    "product": r"gemm|nvjet|cublas|cutlass|xmma|matmul|\bmm\b|addmm|bmm|linear|convolution|conv2d|implicit",
    "optimizer": r"multi_tensor|adam|lamb|l2norm",
    "random": r"bernoulli|dropout|philox|distribution|random|normal_|uniform_",
    "norm, softmax, loss": r"norm|softmax|cross_entropy|nll",
    "communication": r"nccl|gloo|all_reduce|reduce_scatter",
    "copy": r"memcpy|memset|copy|cat|index|gather|scatter|masked",
    "reduction": r"reduce|sum",
    "elementwise": r"elementwise|vectorized|silu|swiglu|rope|mul|add",
}


@contextmanager
def timed_trainers(wait: Callable[[], float], timers: list[StepTimer], job: Job, begin: float):
    """Every Trainer that is created inside waits for the GPU first, and gets a :class:`StepTimer`.

    Args:
        wait: waits, and returns the seconds that it took.
        timers: the timers are appended to it.
        begin: ``time.monotonic()`` when the process began.
    """
    init, get_batch_samples, training_step = Trainer.__init__, Trainer.get_batch_samples, Trainer.training_step

    def timed_init(self, *args, **kwargs):
        waited = wait()
        init(self, *args, **kwargs)
        timers.append(StepTimer(self, job, waited, begin))
        self.add_callback(timers[-1])

    @wraps(get_batch_samples)  # so that the package recognises the method
    def counted_batches(self, *args):
        batches, tokens = get_batch_samples(self, *args)
        for batch in batches:
            lengths, images = batch["lengths"].tolist(), len(batch.get("pixel_values", ()))
            timers[-1].throughput.add(lengths, len(batch["label_positions"]), images)
        return batches, tokens

    @wraps(training_step)
    def noted_step(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        timers[-1].losses.append(loss.detach())
        return loss

    Trainer.__init__, Trainer.get_batch_samples, Trainer.training_step = timed_init, counted_batches, noted_step
    try:
        yield
    finally:
        Trainer.__init__, Trainer.get_batch_samples, Trainer.training_step = init, get_batch_samples, training_step


class StepTimer(TrainerCallback):
    """Times the steps of one Trainer: on a GPU by its own clock, from the end of a step's work to the end of the next
    one's, so that the host may run ahead as in a user's run; on a CPU by the host's.

    The last ``PROFILED`` steps of a job with ``profile`` are not among those that count.
    """

    def __init__(self, trainer: Trainer, job: Job, waited: float, begin: float):
        self.job, self.waited, self.begin = job, waited, begin
        self.cuda = trainer.args.device.type == "cuda"
        self.throughput = Throughput(trainer.model, trainer.args.device)
        self.steps: list[dict[str, float]] = []  # tokens and FLOPs of each
        self.marks: list[list[Any]] = []  # the beginning and the end of each step
        self.losses: list[torch.Tensor] = []  # of each step, on the device
        self.startup = {"until_trainer": time.monotonic() - self.begin - self.waited}
        self.at_rest = self.clock = self.profiler = self.profile = None
        self.clock_line = ""

    def mark(self) -> Any:
        """A moment: on a GPU when it has done what it was given so far."""
        if not self.cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> list[float]:
        """Of all ended steps. Waits for them."""
        if not self.cuda:
            return [1e3 * (end - begin) for begin, end in self.marks]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in self.marks]

    def seconds_until_now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.monotonic() - self.begin - self.waited

    def on_train_begin(self, *_, **__):
        if self.cuda:
            self.at_rest = torch.cuda.memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        self.startup["until_first_step"] = self.seconds_until_now()
        self.begins = self.mark()

    def on_step_begin(self, args, state, control, **_):
        if self.job.profile and state.global_step == self.job.steps:
            kinds = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(activities=[kinds.CUDA if self.cuda else kinds.CPU])
            write_result(self.job, {"status": "ok", **self.result()})  # in case the profiler ends the process
            self.profiler.start()
            self.begins = self.mark()  # after what the profiler needed

    def on_step_end(self, args, state, control, **_):
        end = self.mark()
        self.marks.append([self.begins, end])
        self.begins = end
        counted = self.throughput.counts
        self.steps.append({"tokens": counted["tokens"], "flops": counted["flops"]})
        self.throughput.counts = dict.fromkeys(counted, 0)
        if len(self.steps) == 1:
            self.startup["until_first_step_ended"] = self.seconds_until_now()
        if self.cuda and len(self.steps) == self.job.warm_up + 1 and shutil.which("nvidia-smi"):
            self.clock = subprocess.Popen(
                ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"],
                stdout=subprocess.PIPE,
                text=True,
            )
        if self.profiler is not None and len(self.steps) == self.job.steps + PROFILED:
            wall = sum(self.milliseconds()[self.job.steps :])
            self.profiler.stop()
            self.profile = kernel_table(self.profiler, wall)

    def result(self) -> dict[str, object]:
        ms = self.milliseconds()
        timed = [step | {"ms": t} for step, t in zip(self.steps, ms, strict=True)][self.job.warm_up : self.job.steps]
        found = figures(timed, self.throughput.peak)
        if self.cuda:
            found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
            found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
            found["at_rest_gib"] = self.at_rest
        if self.clock is not None:
            self.clock_line = self.clock_line or self.clock.communicate()[0].strip()
            found["clock"] = self.clock_line
        if self.profile is not None:
            found["profile"] = self.profile
        startup = {name: round(seconds, 2) for name, seconds in self.startup.items()}
        steps = {"ms": [round(t, 2) for t in ms], "losses": [round(float(loss), 6) for loss in self.losses]}
        return found | {"startup_seconds": startup, "waited_for_gpu": round(self.waited, 2), **steps}


def figures(steps: list[dict[str, float]], peak: float | None) -> dict[str, float]:
    """Medians over steps ``{"ms", "tokens", "flops"}``; MFU where the device's peak in FLOP/s is known."""
    if not steps:
        return {}
    found = {"ms_per_step": statistics.median(step["ms"] for step in steps)}
    found["tokens_per_second"] = statistics.median(1e3 * step["tokens"] / step["ms"] for step in steps)
    found["model_tflop_per_step"] = statistics.median(step["flops"] for step in steps) / 1e12
    if peak is not None:
        found["mfu"] = statistics.median(1e3 * step["flops"] / step["ms"] for step in steps) / peak
    return found


def kernel_table(profiler, wall_ms: float) -> dict[str, object]:
    """Kernels (on a CPU: operators) by time and in groups, per step; ``busy_ms``: at least one of them runs."""
    events = profiler.events()
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    kernels: dict[str, list[float]] = {}
    spans = []
    for event in on_device or events:
        span = event.time_range
        spans.append((span.start, span.end))
        entry = kernels.setdefault(event.name, [0, 0.0])
        entry[0] += 1
        entry[1] += (span.elapsed_us() if on_device else event.self_cpu_time_total) / 1e3
    busy, until = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    groups: dict[str, list[float]] = {}
    rows = []
    for name, (calls, ms) in sorted(kernels.items(), key=lambda item: -item[1][1]):
        group = next((g for g, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "other")
        total = groups.setdefault(group, [0, 0.0])
        total[0], total[1] = total[0] + calls, total[1] + ms
        rows.append({"name": name[:160], "group": group, "calls": calls / PROFILED, "ms": round(ms / PROFILED, 3)})
    return {
        "wall_ms": round(wall_ms / PROFILED, 2),
        "busy_ms": round(busy / 1e3 / PROFILED, 2),
        "groups": {
            group: {"calls": calls / PROFILED, "ms": round(ms / PROFILED, 2)}
            for group, (calls, ms) in sorted(groups.items(), key=lambda item: -item[1][1])
        },
        "kernels": rows[:LISTED_KERNELS],
    }
