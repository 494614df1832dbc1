"""One row of benchmarks/train.py: a run in a separate process, timed step by step.

This package's is scripts/train_vit_llm.py as a user starts it; stock is in train_stock.py. The same callback
(train_meter.py) measures both.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import runpy
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from llava_moslora.errors import Refusal

ROOT = Path(__file__).parents[1]
STOCK = {"stock": True, "stock-bf16": False}  # name → whether PEFT's adapters are in float32, its default
RECOMPUTE = re.compile(r"none|full|selective|every:[1-9]\d*")
ADAPTER_KERNELS = ("torch", "triton")
DATA = {"ragged": "ragged", "packed": "ragged", "llm": "text"}  # word of a row → the lengths of its records
PROFILED = 2  # steps


@dataclass(frozen=True)
class Row:
    """What is run: ``stock``, ``stock-bf16``, or this package under a file of zero_configs, such as
    ``zero2+selective+liger+triton@4``; ``stock+ragged`` and ``stock+llm`` too.

    Args:
        base: ``stock``, ``stock-bf16`` or the name of a DeepSpeed file.
        recompute: what backward recomputes: ``none``, ``full``, ``selective`` or ``every:N``.
        liger: Liger's kernels in the LLM.
        kernel: ``torch`` or ``triton`` for the adapters; None: the package's choice.
        bits: 16, or 4 for an NF4 LLM.
        data: ``ragged``: records of LLaVA's lengths; ``packed``: these, several in a row of the batch; ``llm``: an LLM
            without a vision tower on long texts; None: records of ``--lengths``.
        batch: records per step; None: ``--batch``.
    """

    base: str
    recompute: str = "full"
    liger: bool = False
    kernel: str | None = None
    bits: int = 16
    data: str | None = None
    batch: int | None = None

    @classmethod
    def parse(cls, text: str) -> Row:
        """
        Raises:
            Refusal: not a row's name.
        """
        expected = (
            "stock or stock-bf16[+ragged|llm], or ZERO[+none|full|selective|every:N][+liger][+torch|triton][+4bit]"
            "[+ragged|packed|llm]; then [@N]"
        )
        name, _, batch = text.partition("@")
        base, *words = name.split("+")
        settings: dict[str, object] = {}
        for word in words:
            if RECOMPUTE.fullmatch(word):
                key, value = "recompute", word
            elif word in ADAPTER_KERNELS:
                key, value = "kernel", word
            elif word in DATA:
                key, value = "data", word
            elif word in ("liger", "4bit"):
                key, value = ("liger", True) if word == "liger" else ("bits", 4)
            else:
                raise Refusal("C-FLAG", f"unknown word in a row: {word!r}", key="--rows", found=text, expected=expected)
            if key in settings:
                raise Refusal("C-FLAG", f"two words for {key}", key="--rows", found=text, expected=expected)
            settings[key] = value
        known = words in ([], ["ragged"], ["llm"]) if base in STOCK else re.fullmatch(r"zero\w+", base)
        if not known or ("@" in text and not re.fullmatch(r"[1-9]\d*", batch)):
            raise Refusal("C-FLAG", "not a row of this benchmark", key="--rows", found=text, expected=expected)
        return cls(base, batch=int(batch) if batch else None, **settings)

    @property
    def name(self) -> str:
        """As :meth:`parse` reads it, without the batch."""
        words = [self.base]
        if self.base not in STOCK:
            words += [self.recompute, *["liger"] * self.liger, *filter(None, [self.kernel])]
        return "+".join([*words, *["4bit"] * (self.bits == 4), *filter(None, [self.data])])

    @property
    def llm_alone(self) -> bool:
        return self.data == "llm"

    def lengths(self, default: str) -> str:
        """Of this row's records; ``default`` is ``--lengths``."""
        return default if self.data is None else DATA[self.data]


@dataclass(frozen=True)
class Job:
    """A row and everything that its process needs; sent between processes as JSON."""

    row: str
    batch: int
    steps: int
    warm_up: int
    lengths: str
    layers: int | None
    tiny: bool
    profile: bool
    workers: int
    folder: str  # of the models
    data: str
    records: int  # in it
    run: str  # the run folder, made by the row; result.json, log and the mark that it has the GPU lie next to it
    port: int

    @property
    def total_steps(self) -> int:
        return self.steps + PROFILED * self.profile

    def file(self, name: str) -> Path:
        return Path(f"{self.run}.{name}")

    @property
    def llm(self) -> Path:
        return Path(self.folder) / ("llm" if self.layers is None else f"llm-{self.layers}")


class GpuLock:
    """One run at a time on the GPU: the next one may load its weights while this one is measured."""

    def __init__(self, job: Job):
        self.job, self.waited = job, None
        self.lock = os.open(Path(job.folder) / "gpu.lock", os.O_RDWR | os.O_CREAT)

    def acquire(self) -> float:
        """Returns the seconds that this took."""
        if self.waited is not None:
            return self.waited
        before = time.monotonic()
        fcntl.flock(self.lock, fcntl.LOCK_EX)  # until this process ends
        self.waited = time.monotonic() - before
        self.job.file("has-gpu").touch()
        return self.waited


def run_row(job: Job) -> None:
    """Measure, and write ``result.json`` next to the run folder whatever happens."""
    begin = time.monotonic()
    from train_meter import timed_trainers

    gpu, row = GpuLock(job), Row.parse(job.row)
    result: dict[str, object] = {"status": "ok"}
    timers: list = []
    try:
        if row.bits == 4:
            gpu.acquire()  # weights are quantised on the GPU while they are loaded
        with timed_trainers(gpu.acquire, timers, job, begin):
            if row.base in STOCK:
                from train_stock import train_stock

                train_stock(job, row)
            else:
                train_ours(job, row)
    except (Exception, SystemExit) as error:
        result = {"status": status_of(error), "message": message_of(error)}
        traceback.print_exc()
    for timer in timers:
        result |= timer.result()
    write_result(job, result)


def write_result(job: Job, result: dict) -> None:
    waiting = job.file("result.json.part")
    waiting.write_text(json.dumps(result))
    os.replace(waiting, job.file("result.json"))


def message_of(error: BaseException) -> str:
    return str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"[:600]


def status_of(error: BaseException) -> str:
    if type(error).__name__ == "OutOfMemoryError" or getattr(error, "code", "") == "E-MEMORY":
        return "out of memory"
    return "refused" if isinstance(error, Refusal) else "error"


def ours_command(job: Job, row: Row) -> tuple[list[str], dict[str, str]]:
    """The arguments of scripts/train_vit_llm.py and what is added to its environment."""
    folder, rank = Path(job.folder), 4 if job.tiny else 64
    settings = common_settings(job) | {
        "deepspeed": ROOT / "zero_configs" / f"{row.base}.json",
        "model_name_or_path": job.llm,
        "data_path": job.data,
        "data_cache": folder / "cache",
        "data_order": "sequential",
        "model_max_length": longest(job),
        "bits": row.bits,
        "lora_r": rank,
        "health_steps": 0,
        "recompute": row.recompute,
        "use_liger_kernel": row.liger,
    }
    if not row.llm_alone:
        settings |= {
            "vision_tower": folder / "clip",
            "pretrain_mm_mlp_adapter": folder / "projector.safetensors",
            "image_folder": folder / "images",
            "vision_lora_r": rank,
        }
    if row.data == "packed":
        settings |= {"packing": True, "data_order": "shuffle"}
    arguments = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return arguments, {"LLAVA_MOSLORA_KERNEL": row.kernel} if row.kernel else {}


def longest(job: Job) -> int:
    from train_parts import max_length

    return max_length(job.lengths)


def common_settings(job: Job) -> dict[str, object]:
    """Settings of the Trainers of all rows; with a constant learning rate their losses are comparable step by step."""
    return {
        "output_dir": job.run,
        "per_device_train_batch_size": job.batch,
        "max_steps": job.total_steps,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "logging_steps": job.total_steps + 1,  # the meter keeps the losses; a log makes the host wait
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": job.workers,
        "dataloader_persistent_workers": job.workers > 0,
        "bf16": True,
    }


def train_ours(job: Job, row: Row) -> None:
    arguments, environment = ours_command(job, row)
    launcher = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_SIZE": 1, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job.port}  # what the deepspeed launcher sets
    os.environ |= environment | {name: str(value) for name, value in launcher.items()}
    script = ROOT / "scripts" / "train_vit_llm.py"
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="train_vit_llm")["main"]()
