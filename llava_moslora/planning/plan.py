"""A plan: memory, time, disk and host memory of one setting, and the fastest setting that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from llava_moslora.adapters.methods import METHODS
from llava_moslora.config import AUTO
from llava_moslora.devices import COMMAND_LINE, DEVICES, GIB, Device
from llava_moslora.errors import Refusal, did_you_mean
from llava_moslora.planning.duration import Duration, duration, factors_of
from llava_moslora.planning.memory import Memory, memory
from llava_moslora.planning.records import Records
from llava_moslora.planning.setting import Batch, Choice, Model, Pair, Zero
from llava_moslora.planning.states import ADAM_BYTES, Counts, count
from llava_moslora.planning.suggest import Candidate, fastest_recompute, largest_micro_batch, suggest
from llava_moslora.runs.folder import checkpoint_bytes

RANK_ON_HOST = 0.95e9  # bytes of a process with torch and transformers imported (benchmarks/results/data.json)
LOADER_ON_HOST = 0.2e9  # of a process that reads images, beyond what it shares; assumed


@dataclass(frozen=True)
class Request:
    """What a plan is asked for.

    Args:
        device_name: a key of ``devices.DEVICES``.
        choice: ``recompute`` may be ``auto``, which :func:`make_plan` decides.
        gpus: N, on one host as far as communication goes.
        zeros: DeepSpeed files that ``--suggest`` may choose, with what they say.
        state_bytes: of the optimizer, per trained number, or ``states.FACTORED``.
        epochs, max_steps: the length of the run; ``max_steps`` counts where it is above 0.
        save_steps, save_total_limit: checkpoints that are kept.
        pairs: of earlier runs on such a GPU, which narrow the ranges.
    """

    model: Model
    choice: Choice
    records: Records
    device_name: str
    gpus: int
    zeros: tuple[tuple[str | None, Zero], ...] = ()
    state_bytes: int | None = ADAM_BYTES
    epochs: float = 1
    max_steps: int = -1
    workers: int = 4
    image_engine: str = "pil"
    save_steps: float = 500
    save_total_limit: int | None = None
    pairs: tuple[Pair, ...] = ()
    gib: float | None = None  # of the card, where it is not as in devices.DEVICES
    stands_for: str | None = None  # the name of a GPU that is not in devices.DEVICES: its speed is not known

    @property
    def device(self) -> Device:
        return DEVICES[self.device_name]

    @property
    def capacity(self) -> float:
        """Bytes of one GPU."""
        return (self.device.memory if self.gib is None else self.gib) * GIB

    @property
    def counts(self) -> Counts:
        return count(self._model(self.choice))

    @property
    def steps(self) -> int | None:
        if self.max_steps > 0:
            return self.max_steps
        if self.records.count is None:
            return None
        in_step = self.choice.micro_batch * self.choice.accumulation * self.gpus
        return math.ceil(math.ceil(self.records.count / in_step) * self.epochs)

    def batch(self, choice: Choice) -> Batch:
        return self.records.largest_batch(choice.micro_batch, choice.accumulation, self.gpus)

    def memory(self, choice: Choice) -> Memory:
        found = memory(self.model, choice, self.batch(choice), self.device, self.gpus, self.state_bytes)
        return found.as_seen(self.pairs)

    def fits(self, choice: Choice) -> bool:
        """For certain."""
        return self.memory(choice).fits(self.capacity) is True

    def duration(self, choice: Choice) -> Duration:
        model = self._model(choice)
        return duration(
            model, count(model), choice, self.records, self.device, self.gpus, steps=self.steps, workers=self.workers,
            image_engine=self.image_engine, factors=factors_of(self.device_name, choice, self.pairs),
        )  # fmt: skip

    def _model(self, choice: Choice) -> Model:
        return self.model.variant(choice.bits, choice.zero.stage == 3)


@dataclass(frozen=True)
class Plan:
    """
    Args:
        largest: the largest micro-batch that fits, all else as it is; 0: none, or not looked for.
        disk: bytes by what they are for. host: bytes of one host's memory, likewise.
        suggestions: the fastest settings that fit, the fastest first; empty where not asked for, or where none fits.
        auto: the request asked for ``--recompute auto``; it has the way that was chosen now. faster: the next faster
            way, which does not certainly fit; None: there is none.
    """

    request: Request
    memory: Memory
    duration: Duration
    largest: int
    disk: dict[str, int]
    host: dict[str, int]
    suggestions: list[Candidate] = field(default_factory=list)
    auto: bool = False
    faster: Choice | None = None

    @property
    def fits(self) -> bool | None:
        return self.memory.fits(self.request.capacity)


def make_plan(request: Request, *, with_suggestions: bool = False, with_largest: bool = True) -> Plan:
    auto, faster = request.choice.recompute == AUTO, None
    if auto:
        chosen, faster = fastest_recompute(request.choice, request.fits, lambda other: request.duration(other).step)
        request = replace(request, choice=chosen)
    choice, counts = request.choice, request.counts
    used = request.memory(choice)
    suggestions = []
    if with_suggestions:
        suggestions = suggest(
            choice, request.zeros, request.gpus, request.fits, lambda other: request.duration(other).step,
            nf4=not METHODS[request.model.adapter.method].not_over_nf4,
        )  # fmt: skip
    largest = largest_micro_batch(choice, lambda c: request.fits(replace(c, accumulation=1))) if with_largest else 0
    return Plan(
        request=request,
        memory=used,
        duration=request.duration(choice),
        largest=largest,
        disk=_disk(request, counts),
        host=_host(request, counts, used),
        suggestions=suggestions,
        auto=auto,
        faster=faster,
    )


def device_of(name: str) -> str:
    """A key of ``DEVICES`` from ``--gpu``.

    Raises:
        Refusal: C-FLAG, no such name.
    """
    wanted = name.lower().replace("_", "-")
    if wanted in COMMAND_LINE:
        return COMMAND_LINE[wanted]
    if name in DEVICES:
        return name
    raise Refusal(
        "C-FLAG", "unknown GPU", key="--gpu", found=name, expected=" | ".join(COMMAND_LINE),
        fix=did_you_mean(name, COMMAND_LINE) or None,
    )  # fmt: skip


def _disk(request: Request, counts: Counts) -> dict[str, int]:
    """Checkpoints, while the newest is written beside those that are kept, and an export of the merged model."""
    kept = request.save_total_limit
    if kept is None:
        steps, every = request.steps or 1, request.save_steps
        kept = math.ceil(1 / every) if every < 1 else math.ceil(steps / every)
    one = checkpoint_bytes(counts.trained)
    return {f"{kept + 1} checkpoints": (kept + 1) * one, "export in 16 bits": 2 * counts.merged}


def _host(request: Request, counts: Counts, used: Memory) -> dict[str, int]:
    """Of one host with all GPUs. The weight files are mapped, once for all ranks, and may leave memory again."""
    workers = request.workers * request.gpus
    return {
        f"{request.gpus} processes": round(request.gpus * RANK_ON_HOST),
        f"{workers} image readers": round(workers * LOADER_ON_HOST),
        "offloaded states": used.host * request.gpus,
        "weight files, mapped": 2 * counts.merged,
    }
