"""Cost of a training step at full size: LLaMA-3-8B and CLIP-L/336 with random weights, on one GPU.

    python benchmarks/train.py [--rows stock zero2+full zero1+selective zero1+none@4] [--batch 8]

A row of the table is one run. All runs train on the same batches, with adapters of rank 64 in both towers and a trained
projector:

- stock: stock PEFT's LoRA on stock LlavaForConditionalGeneration under a plain Hugging Face Trainer in bf16 with full
  gradient checkpointing; its adapters are in float32, as they are by default; stock-bf16: in bf16;
- scripts/train_vit_llm.py in bf16 with a trained mixer everywhere, joined with "+": a file of zero_configs, what
  backward recomputes (none, full, every:2, selective), liger for its kernels in place of this package's fused layers,
  the adapters' kernels (torch, triton), 4bit for an NF4 LLM;
- words for both: ragged (records of LLaVA's lengths), llm (an LLM alone on texts of 4,096 tokens), and for this package
  packed (ragged records, several in a row of the batch); "@4" sets the records per step of the row. With --lengths text
  and without the word llm, a LLaVA is trained on texts: this package then runs the vision tower on one blank image a
  step, stock does not.

Each row is written to --output when its run has ended, one that failed with its message. The table shows tokens per
second (without padding) and MFU, medians after the warm-up, the peak memory of a step and the last loss; below it,
every row of this package is set beside stock's. The file also holds every step's time and loss and, where one was
computed, the lower bound of a roofline. --profile adds two steps under torch's profiler. --tiny runs the same code with
tiny models, also on a CPU; its numbers mean nothing, and nothing is written unless --output names a file.

With limited GPU time, the most important rows first; what does not fit into 6 minutes is not measured:

    python benchmarks/train.py --steps 7 --warm-up 3 --limit 60 --deadline 350 --rows zero1+selective stock \\
        stock-bf16 zero1+full zero1+none@4 zero1+selective+llm@4 stock+llm@4 zero1+selective+packed stock+ragged
    python -m pytest -m gpu
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA: runs are forked

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

from train_report import Results, comparisons, read_rows, table  # noqa: E402
from train_row import PROFILED, ROOT, STOCK, Job, Row, common_settings, ours_command, run_row  # noqa: E402

from llava_moslora.devices import use_expandable_segments  # noqa: E402
from llava_moslora.errors import Refusal, run_script  # noqa: E402

ROWS = ["stock", "stock-bf16", "zero1+full", "zero1+full+4bit", "zero1+selective"]


def main() -> None:
    begin, args = time.monotonic(), parse()
    use_expandable_segments()  # as a training does itself; here for the stock rows too
    rows = [Row.parse(text) for text in args.rows]
    if not args.tiny and not args.dry_run and not torch.cuda.is_available():
        raise Refusal("E-DEVICE", "needs a GPU with about 40 GB", found="none", fix="--tiny runs the code on a CPU")
    folder = args.keep or Path(tempfile.mkdtemp(prefix="train-benchmark-"))
    try:
        jobs = [make_job(row, number, folder, args) for number, row in enumerate(rows)]
        if args.dry_run:
            print("\n".join(described(job) for job in jobs))
            return
        words = json.dumps({"prepare": [asdict(job) for job in jobs]})
        preparing = subprocess.Popen([sys.executable, __file__, "--child", words])
        by_fork = not args.fresh and can_fork()  # imports for seconds, while the models are made
        result = prepared(preparing, folder, args)
        results = Results(args.output, result, read_rows(args.output, result["device"]) if args.append else [])
        before = len(results.rows)
        print(f"models, data and imports: {time.monotonic() - begin:.0f} s", flush=True)
        deadline = args.deadline - (time.monotonic() - begin) + time.time()
        measure(jobs, results.add, by_fork=by_fork, alone=args.alone, limit=args.limit, deadline=deadline)
    finally:
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n" + table(results.rows))
    print("\n" + comparisons(results.rows))
    if args.output is not None:
        print(f"written: {args.output}")
    if not any(row["status"] == "ok" for row in results.rows[before:]):
        raise Refusal("E-RUN", "no run has finished", found="see above")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--steps", type=int, default=12, help="steps of each run, warm-up included")
    parser.add_argument("--warm-up", type=int, default=4, help="first steps, which are not timed")
    parser.add_argument("--batch", type=int, default=8, help="records per step, where the row does not say")
    parser.add_argument(
        "--lengths",
        default="uniform",
        choices=["uniform", "ragged", "text"],
        help="of rows without a word: uniform: 2,048 tokens with an image, 200 of them trained; ragged: as LLaVA's; "
        "text: 4,096, no image",
    )
    parser.add_argument("--layers", type=int, help="use only the first so many layers of the LLM")
    parser.add_argument("--profile", action="store_true", help="two more steps under torch's profiler")
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--keep", type=Path, help="folder of models and data, kept and reused; default: temporary")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/train-DEVICE.json")
    parser.add_argument("--append", action="store_true", help="keep the rows that are in --output already")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a run may take once it has the GPU")
    parser.add_argument(
        "--deadline", type=float, default=float("inf"), help="seconds from now after which everything is stopped"
    )
    parser.add_argument("--alone", action="store_true", help="load a run's weights only when the one before has ended")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for each run, instead of a fork")
    parser.add_argument("--tiny", action="store_true", help="tiny models, also on a CPU: to test the code")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child)
    if args.warm_up >= args.steps:
        raise Refusal("C-FLAG", "no step is timed", key="--warm-up", found=args.warm_up, expected="less than --steps")
    if args.append and args.output is None:
        raise Refusal("C-FLAG", "there is no file to append to", key="--append", fix="name the file with --output")
    return args


def make_job(row: Row, number: int, folder: Path, args: argparse.Namespace) -> Job:
    largest = max(Row.parse(text).batch or args.batch for text in args.rows)
    count = largest * (args.steps + PROFILED * args.profile)
    lengths, label = row.lengths(args.lengths), re.sub(r"[^\w.-]+", "-", row.name)
    return Job(
        row=row.name,
        batch=row.batch or args.batch,
        steps=args.steps,
        warm_up=args.warm_up,
        lengths=lengths,
        layers=args.layers,
        tiny=args.tiny,
        profile=args.profile,
        workers=args.workers,
        folder=str(folder),
        data=str(folder / f"data-{lengths}-{count}.json"),
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
    """The device and the versions, from the process that has made models and data: this one must not start CUDA."""
    if status := preparing.wait():
        raise Refusal("E-RUN", "the models and data could not be made", found=f"status {status}", fix="see above")
    result = json.loads((folder / "facts.json").read_text())
    if args.output is None and not args.tiny:
        name = result["device"].lower().replace(" ", "-")
        args.output = ROOT / "benchmarks" / "results" / f"train-{name}.json"
    return result | {"tiny": args.tiny}


def run_child(text: str) -> None:
    """The main of a process that is not forked."""
    resume_cuda()
    words = json.loads(text)
    if "prepare" in words:
        from train_parts import facts, make_data, make_models

        jobs = [Job(**job) for job in words["prepare"]]
        folder = Path(jobs[0].folder)
        make_models(folder, jobs[0].llm, tiny=jobs[0].tiny, layers=jobs[0].layers)
        for job in jobs:
            alone = Row.parse(job.row).llm_alone
            make_data(Path(job.data), folder, job.llm, job.lengths, job.records, tiny=job.tiny, images=not alone)
        (folder / "facts.json").write_text(json.dumps(facts()))
    else:
        run_row(Job(**words))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    run_script(main)
