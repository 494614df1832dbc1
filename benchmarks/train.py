"""What a training step costs at real size: LLaMA-3-8B and CLIP-L/336 with random weights, on one GPU.

    python benchmarks/train.py [--rows stock zero2+full zero1+selective zero1+none@4] [--batch 8]

A row is a run of its own over the same batches as the others, with adapters of rank 64 in both towers and a trained
projector:

- stock: stock PEFT's LoRA on stock LlavaForConditionalGeneration under a plain Hugging Face Trainer in bf16 with full
  gradient checkpointing; its adapters are in float32, as they are by default; stock-bf16: in bf16;
- ours, scripts/train_vit_llm.py in bf16 with a trained mixer everywhere: a file of zero_configs, then what backward
  recomputes (none, full, every:2, selective), liger in place of our fused layers, the kernels (torch, triton) and 4bit,
  an NF4 LLM; "@4" sets the records per step of a row.

Each row is written to --output when it has ended, one that fails with its message. The table shows tokens per second
(padding not counted) and MFU, medians after the warm-up, and the peak memory of a step; the file holds every step's
time and loss and, where there is one, what a roofline says beforehand. --profile adds two steps under torch's
profiler. --tiny runs the same code with tiny parts, on a CPU too, and writes nothing unless --output names a file: its
figures mean nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA: rows are forked

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from train_process import can_fork, measure, postpone_cuda, resume_cuda

postpone_cuda()

from train_report import Results, read_rows, table  # noqa: E402
from train_row import PROFILED, ROOT, STOCK, Job, Row, common_settings, ours_command, run_row  # noqa: E402

from llava_moslora.errors import Refusal, run_script  # noqa: E402

ROWS = ["stock", "stock-bf16", "zero1+full", "zero1+full+4bit", "zero1+selective"]


def main() -> None:
    begin, args = time.monotonic(), parse()
    rows = [Row.parse(text) for text in args.rows]
    if not args.tiny and not args.dry_run and not torch.cuda.is_available():
        raise Refusal("E-DEVICE", "needs a GPU with about 40 GB", found="none", fix="--tiny runs the code on a CPU")
    folder = args.keep or Path(tempfile.mkdtemp(prefix="train-benchmark-"))
    try:
        jobs = [make_job(row, number, folder, args) for number, row in enumerate(rows)]
        if args.dry_run:
            print("\n".join(described(job) for job in jobs))
            return
        preparing = subprocess.Popen([sys.executable, __file__, "--child", json.dumps({"prepare": asdict(jobs[0])})])
        by_fork = not args.fresh and can_fork()  # seconds of imports, while the parts are made
        result = prepared(preparing, folder, args)
        results = Results(args.output, result, read_rows(args.output, result["device"]) if args.append else [])
        before = len(results.rows)
        print(f"parts, data and imports: {time.monotonic() - begin:.0f} s", flush=True)
        deadline = args.deadline - (time.monotonic() - begin) + time.time()
        measure(jobs, results.add, by_fork=by_fork, alone=args.alone, limit=args.limit, deadline=deadline)
    finally:
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n" + table(results.rows))
    if args.output is not None:
        print(f"written: {args.output}")
    if not any(row["status"] == "ok" for row in results.rows[before:]):
        raise Refusal("E-RUN", "no row ran to its end", found="see above")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, default=12, help="of each row, warm-up included")
    parser.add_argument("--warm-up", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--batch", type=int, default=8, help="records per step, where the row does not say")
    parser.add_argument(
        "--lengths",
        default="uniform",
        choices=["uniform", "ragged", "text"],
        help="uniform: 2,048 tokens with an image, 200 of them trained; ragged: as LLaVA's; text: 4,096, no image",
    )
    parser.add_argument("--layers", type=int, help="of the LLM, the first so many")
    parser.add_argument("--profile", action="store_true", help="two more steps under torch's profiler")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--keep", type=Path, help="make the parts in this folder, or use those that are there")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/train-DEVICE.json")
    parser.add_argument("--append", action="store_true", help="keep the rows that --output holds")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a row may take once it has the GPU")
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), help="seconds from now until whatever still runs is stopped"
    )
    parser.add_argument("--alone", action="store_true", help="load a row's weights only when the row before has ended")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for each row, instead of a fork")
    parser.add_argument("--tiny", action="store_true", help="tiny parts, on a CPU too: the code, not the cost")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child)
    if args.warm_up >= args.steps:
        raise Refusal("C-FLAG", "no step is counted", key="--warm-up", found=args.warm_up, expected="less than --steps")
    if args.append and args.output is None:
        raise Refusal("C-FLAG", "appends to what?", key="--append", fix="name the file with --output")
    return args


def make_job(row: Row, number: int, folder: Path, args: argparse.Namespace) -> Job:
    largest = max(Row.parse(text).batch or args.batch for text in args.rows)
    count = largest * (args.steps + PROFILED * args.profile)
    label = re.sub(r"[^\w.-]+", "-", row.name)
    return Job(
        row=row.name,
        batch=row.batch or args.batch,
        steps=args.steps,
        warm_up=args.warm_up,
        lengths=args.lengths,
        layers=args.layers,
        tiny=args.tiny,
        profile=args.profile,
        workers=args.workers,
        folder=str(folder),
        data=str(folder / f"data-{args.lengths}-{count}.json"),
        records=count,
        run=str(folder / f"run-{number}-{label}"),
        port=0,
    )


def described(job: Job) -> str:
    row = Row.parse(job.row)
    if row.base in STOCK:
        settings = {"adapters": "float32" if STOCK[row.base] else "bf16"} | common_settings(job)
        return f"{job.row}@{job.batch}: PEFT's LoRA under Trainer({settings})"
    arguments, environment = ours_command(job, row)
    words = [*(f"{name}={value}" for name, value in environment.items()), "deepspeed", "--num_gpus", "1"]
    return f"{job.row}@{job.batch}: {shlex.join([*words, 'scripts/train_vit_llm.py', *arguments])}"


def prepared(preparing: subprocess.Popen, folder: Path, args: argparse.Namespace) -> dict:
    """The device and the versions, when a process of its own has made parts and data: this one must not start CUDA."""
    if status := preparing.wait():
        raise Refusal("E-RUN", "the parts could not be made", found=f"status {status}", fix="see above")
    result = json.loads((folder / "facts.json").read_text())
    if args.output is None and not args.tiny:
        name = result["device"].lower().replace(" ", "-")
        args.output = ROOT / "benchmarks" / "results" / f"train-{name}.json"
    return result | {"tiny": args.tiny}


def run_child(text: str) -> None:
    """What the processes do that are not forked."""
    resume_cuda()
    words = json.loads(text)
    if "prepare" in words:
        from train_parts import facts, make_data, make_parts

        job = Job(**words["prepare"])
        folder = Path(job.folder)
        make_parts(folder, tiny=job.tiny, layers=job.layers)
        make_data(Path(job.data), folder, job.lengths, job.records, tiny=job.tiny)
        (folder / "facts.json").write_text(json.dumps(facts()))
    else:
        run_row(Job(**words))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    run_script(main)
