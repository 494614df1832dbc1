"""One row of benchmarks/train.py, in a process of its own: a run that is timed, step by step, by :class:`Meter`.

Ours is scripts/train_vit_llm.py as a user starts it. Stock is PEFT's LoRA on ``LlavaForConditionalGeneration`` under a
plain Hugging Face Trainer, over the same batches, from the same collator, with the same optimizer and loader settings.
Both are measured by the same callback, which this file adds to whatever Trainer is made.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import runpy
import statistics
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava_moslora.errors import Refusal

ROOT = Path(__file__).parents[1]
STOCK = {"stock": True, "stock-bf16": False}  # name → PEFT's adapters in float32, as it has them by default
RECOMPUTE = re.compile(r"none|full|selective|every:[1-9]\d*")
KERNELS = ("torch", "triton")
GIB = 2**30
PROFILED = 2  # steps
KEPT = 40  # kernels of a profile
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


@dataclass(frozen=True)
class Row:
    """What is measured: ``stock``, ``stock-bf16``, or ours under a file of zero_configs, such as
    ``zero2+selective+liger+triton@4``.

    Args:
        base: ``stock``, ``stock-bf16`` or the name of a DeepSpeed file.
        recompute: what backward recomputes: ``none``, ``full``, ``selective`` or ``every:N``.
        liger: Liger's kernels in the LLM.
        kernel: ``torch`` or ``triton`` for the adapters; None: the package's choice.
        bits: 16, or 4 for an NF4 LLM.
        batch: records per step; None: ``--batch``.
    """

    base: str
    recompute: str = "full"
    liger: bool = False
    kernel: str | None = None
    bits: int = 16
    batch: int | None = None

    @classmethod
    def parse(cls, text: str) -> Row:
        """
        Raises:
            Refusal: not a row's name.
        """
        expected = "stock, stock-bf16 or ZERO[+none|full|selective|every:N][+liger][+torch|triton][+4bit], then [@N]"
        name, _, batch = text.partition("@")
        base, *words = name.split("+")
        settings: dict[str, object] = {}
        for word in words:
            if RECOMPUTE.fullmatch(word):
                key, value = "recompute", word
            elif word in KERNELS:
                key, value = "kernel", word
            elif word in ("liger", "4bit"):
                key, value = ("liger", True) if word == "liger" else ("bits", 4)
            else:
                raise Refusal("C-FLAG", f"unknown word in a row: {word!r}", key="--rows", found=text, expected=expected)
            if key in settings:
                raise Refusal("C-FLAG", f"two words for {key}", key="--rows", found=text, expected=expected)
            settings[key] = value
        known = base in STOCK or re.fullmatch(r"zero\w+", base)
        if not known or ("@" in text and not re.fullmatch(r"[1-9]\d*", batch)) or (base in STOCK and words):
            raise Refusal("C-FLAG", "not a row of this benchmark", key="--rows", found=text, expected=expected)
        return cls(base, batch=int(batch) if batch else None, **settings)

    @property
    def name(self) -> str:
        """As :meth:`parse` reads it, without the batch."""
        if self.base in STOCK:
            return self.base
        words = [self.base, self.recompute, *["liger"] * self.liger, *filter(None, [self.kernel])]
        return "+".join([*words, *["4bit"] * (self.bits == 4)])


@dataclass(frozen=True)
class Job:
    """A row and everything its process needs to know; JSON between processes."""

    row: str
    batch: int
    steps: int
    warm_up: int
    lengths: str
    layers: int | None
    tiny: bool
    profile: bool
    workers: int
    folder: str  # the parts
    data: str
    records: int  # in it
    run: str  # the run folder, made by the row; result.json, log and the gate's mark lie beside it
    port: int

    @property
    def total_steps(self) -> int:
        return self.steps + PROFILED * self.profile

    def beside(self, name: str) -> Path:
        return Path(f"{self.run}.{name}")

    @property
    def llm(self) -> Path:
        return Path(self.folder) / ("llm" if self.layers is None else f"llm-{self.layers}")


class Gate:
    """One row at a time on the GPU: the next one may load its weights while this one is measured."""

    def __init__(self, job: Job):
        self.job, self.waited = job, None
        self.lock = os.open(Path(job.folder) / "gpu.lock", os.O_RDWR | os.O_CREAT)

    def enter(self) -> None:
        if self.waited is not None:
            return
        before = time.monotonic()
        fcntl.flock(self.lock, fcntl.LOCK_EX)  # until this process ends
        self.waited = time.monotonic() - before
        self.job.beside("gate").touch()


def run_row(job: Job) -> None:
    """Measure, and write ``result.json`` beside the run folder whatever happens."""
    begin = time.monotonic()
    gate, row = Gate(job), Row.parse(job.row)
    result: dict[str, object] = {"status": "ok"}
    meters: list = []
    try:
        if row.bits == 4:
            gate.enter()  # weights are quantised on the GPU while they are loaded
        with metered(job, gate, meters, begin):
            train_stock(job, row) if row.base in STOCK else train_ours(job, row)
    except (Exception, SystemExit) as error:
        result = {"status": status_of(error), "message": f"{type(error).__name__}: {error}"[:600]}
        traceback.print_exc()
    for meter in meters:
        result |= meter.result()
    waiting = job.beside("result.json.part")
    waiting.write_text(json.dumps(result))
    os.replace(waiting, job.beside("result.json"))


def status_of(error: BaseException) -> str:
    if type(error).__name__ == "OutOfMemoryError" or getattr(error, "code", "") == "E-MEMORY":
        return "out of memory"
    return "refused" if isinstance(error, Refusal) else "error"


@contextmanager
def metered(job: Job, gate: Gate, meters: list, begin: float):
    """Every Trainer that is made waits for the GPU first and gets a :class:`Meter`, which sees its batches."""
    from transformers import Trainer

    init, get_batch_samples = Trainer.__init__, Trainer.get_batch_samples

    def metered_init(self, *args, **kwargs):
        gate.enter()
        init(self, *args, **kwargs)
        meters.append(make_meter(self, job, gate.waited, begin))
        self.add_callback(meters[-1])

    def counted_batches(self, *args):
        batches, tokens = get_batch_samples(self, *args)
        for batch in batches:
            meters[-1].speed.count(batch)
        return batches, tokens

    Trainer.__init__, Trainer.get_batch_samples = metered_init, counted_batches
    try:
        yield
    finally:
        Trainer.__init__, Trainer.get_batch_samples = init, get_batch_samples


def make_meter(trainer, job: Job, waited: float, begin: float):
    """The callback that times every step; a class in a function, as its base is seconds of imports."""
    import torch
    from transformers import TrainerCallback

    from llava_moslora.training.speed import Speed

    cuda = trainer.args.device.type == "cuda"

    class Meter(TrainerCallback):
        def __init__(self):
            self.speed = Speed(trainer.model, trainer.args.device)
            self.steps: list[dict[str, float]] = []
            self.startup = {"until_trainer": time.monotonic() - begin - waited}
            self.at_rest = self.clock = self.profiler = self.profile = None

        def now(self) -> float:
            if cuda:
                torch.cuda.synchronize()
            return time.monotonic()

        def on_train_begin(self, *_, **__):
            if cuda:
                self.at_rest = torch.cuda.memory_allocated() / GIB
                torch.cuda.reset_peak_memory_stats()
            self.before = self.now()
            self.startup["until_first_step"] = self.before - begin - waited

        def on_step_begin(self, args, state, control, **_):
            if job.profile and state.global_step == job.steps:
                kinds = torch.profiler.ProfilerActivity
                self.profiler = torch.profiler.profile(activities=[kinds.CUDA if cuda else kinds.CPU])
                self.before = self.now()
                self.profiler.start()

        def on_step_end(self, args, state, control, **_):
            now, counted = self.now(), self.speed.counted
            step = {"ms": 1e3 * (now - self.before), "tokens": counted["tokens"], "flops": counted["flops"]}
            self.steps.append(step)
            if len(self.steps) == 1:
                self.startup["until_first_step_ended"] = now - begin - waited
            if cuda and len(self.steps) == job.warm_up + 1:
                self.clock = subprocess.Popen(
                    ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader"],
                    stdout=subprocess.PIPE,
                    text=True,
                )
            if self.profiler is not None and len(self.steps) == job.steps + PROFILED:
                self.profiler.stop()
                wall = sum(step["ms"] for step in self.steps[job.steps :])
                self.profile = kernel_table(self.profiler, wall)
            self.speed.counted = dict.fromkeys(counted, 0)
            self.before = self.now()

        def on_log(self, args, state, control, logs=None, **_):
            if self.steps and "loss" in (logs or {}):
                self.steps[-1]["loss"] = logs["loss"]

        def result(self) -> dict[str, object]:
            found = figures(self.steps[job.warm_up : job.steps], self.speed.peak)
            if cuda:
                found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
                found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
                found["at_rest_gib"] = self.at_rest
            if self.clock is not None:
                found["clock"] = self.clock.communicate()[0].strip()
            if self.profile is not None:
                found["profile"] = self.profile
            startup = {name: round(seconds, 2) for name, seconds in self.startup.items()}
            steps = {"ms": [round(s["ms"], 2) for s in self.steps], "losses": [s.get("loss") for s in self.steps]}
            return found | {"startup_seconds": startup, "waited_for_gpu": round(waited, 2), **steps}

    return Meter()


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
    from torch.autograd import DeviceType

    events = profiler.events()
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
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
        "kernels": rows[:KEPT],
    }


def ours_command(job: Job, row: Row) -> tuple[list[str], dict[str, str]]:
    """The arguments of scripts/train_vit_llm.py and what is added to its environment."""
    folder, rank = Path(job.folder), 4 if job.tiny else 64
    settings = common_settings(job) | {
        "deepspeed": ROOT / "zero_configs" / f"{row.base}.json",
        "model_name_or_path": job.llm,
        "vision_tower": folder / "clip",
        "pretrain_mm_mlp_adapter": folder / "projector.safetensors",
        "data_path": job.data,
        "image_folder": folder / "images",
        "data_cache": folder / "cache",
        "data_order": "sequential",
        "model_max_length": longest(job),
        "bits": row.bits,
        "lora_r": rank,
        "vision_lora_r": rank,
        "health_steps": 0,
        **recompute_flags(row.recompute),
    }
    if row.liger:
        settings["use_liger_kernel"] = True
    arguments = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return arguments, {"LLAVA_MOSLORA_KERNEL": row.kernel} if row.kernel else {}


def longest(job: Job) -> int:
    from train_parts import max_length

    return max_length(job.lengths)


def recompute_flags(mode: str) -> dict[str, object]:
    from dataclasses import fields

    from llava_moslora.training.arguments import TrainingArguments

    if any(field.name == "recompute" for field in fields(TrainingArguments)) or mode not in ("none", "full"):
        return {"recompute": mode}
    return {"gradient_checkpointing": mode == "full"}


def common_settings(job: Job) -> dict[str, object]:
    """What the Trainers of all rows are given; a constant rate makes their losses comparable step by step."""
    return {
        "output_dir": job.run,
        "per_device_train_batch_size": job.batch,
        "max_steps": job.total_steps,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "logging_steps": 1,
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


def train_stock(job: Job, row: Row) -> None:
    """Stock PEFT's LoRA on the stock model under a plain Trainer, over the batches of the others."""
    import torch
    from peft import LoraConfig, get_peft_model
    from train_parts import TEMPLATE
    from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments, set_seed

    from llava_moslora.data.collate import Collator
    from llava_moslora.data.images import ImageTransform
    from llava_moslora.data.prepare import prepare
    from llava_moslora.data.tokenizer import image_token_id, load_tokenizer
    from llava_moslora.models.assemble import LLM, PROJECTOR, VISION, assemble, linear_suffixes, tokens_per_picture

    folder, rank = Path(job.folder), 4 if job.tiny else 64
    tokenizer = load_tokenizer(job.llm)
    set_seed(42)
    model, preprocessor = assemble(
        job.llm,
        str(folder / "clip"),
        folder / "projector.safetensors",
        tokenizer=tokenizer,
        image_token_id=image_token_id(tokenizer),
        dtype=torch.bfloat16,
    )
    model.__class__ = LlavaForConditionalGeneration  # the same weights under the stock forward
    names = "|".join(name for tower in (LLM, VISION) for name in linear_suffixes(model, tower))
    set_seed(42)
    config = LoraConfig(
        r=rank,
        lora_alpha=128,
        alpha_pattern={f"{re.escape(VISION)}\\..*": 16},  # the script's defaults
        lora_dropout=0.05,
        target_modules=rf"(?:{LLM}|{VISION})\.(?:encoder\.)?layers\.\d+\.(?:{names})",
        modules_to_save=[PROJECTOR],
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=STOCK[row.base])
    model.enable_input_require_grads()
    dataset = prepare(
        job.data,
        folder / "images",
        tokenizer=tokenizer,
        template=TEMPLATE,
        tokens_per_image=tokens_per_picture(model.config.vision_config),
        max_length=longest(job),
        cache_dir=folder / "cache",
    )
    collate = Collator(tokenizer.pad_token_id, folder / "images", ImageTransform.from_settings(preprocessor, "pad"))

    class Stock(Trainer):
        def get_batch_samples(self, *args):
            batches, tokens = super().get_batch_samples(*args)
            for batch in batches:
                batch.pop("record")
            return batches, tokens

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    own = {"gradient_checkpointing": True, "remove_unused_columns": False, "use_cpu": job.tiny, "disable_tqdm": True}
    settings = TrainingArguments(**common_settings(job) | own)
    Stock(model=model, args=settings, train_dataset=dataset, data_collator=collate).train()
