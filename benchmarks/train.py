"""What a training step costs at real size: LLaMA-3-8B and CLIP-L/336 with random weights, on one GPU.

    python benchmarks/train.py [--rows stock zero2+full+liger zero0+selective+liger zero0+none+liger@4] [--batch 8]

A row is a run of its own over the same batches as the others, with adapters of rank 64 in both towers and a trained
projector:

- stock: stock PEFT's LoRA on stock LlavaForConditionalGeneration under a plain Hugging Face Trainer in bf16 with full
  gradient checkpointing; its adapters are in float32, as they are by default; stock-bf16: in bf16;
- ours, scripts/train_vit_llm.py in bf16 with a trained mixer everywhere: a file of zero_configs, then what backward
  recomputes (none, full, every:2, selective), liger, the adapters' kernel (torch, triton) and 4bit, an NF4 LLM;
  "@4" sets the records per step of a row.

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
from dataclasses import asdict, replace
from pathlib import Path

import torch
from train_process import can_fork, measure
from train_row import PROFILED, ROOT, STOCK, Job, Row, common_settings, ours_command, run_row

from llava_moslora.errors import Refusal, run_script

ROWS = ["stock", "stock-bf16", "zero2+full", "zero2+full+liger", "zero0+full+liger", "zero0+selective+liger"]
ROWS += ["zero0+none+liger@4", "zero2+full+liger+4bit"]
# (row, batch) → (milliseconds per step, peak GiB) on an H100 as a roofline has them: the sum over operations of the
# larger of FLOPs / 700 TFLOP/s and bytes / 3.0 TB/s, a lower bound, at 2,048 tokens and 200 labels a record. "~": of
# figures for an H200, split into products and memory traffic and brought to these two rates. None: not computed.
ROOFLINE = {
    ("stock", 8): (2405, 46.2),
    ("stock-bf16", 8): (2053, 44.9),
    ("zero2+full+torch", 8): (2140, 27.2),
    ("zero2+every:2+torch", 8): (1840, 72.0),
    ("zero2+none+torch", 8): (1539, 115.1),
    ("zero2+full+torch", 4): (1101, 22.9),
    ("zero2+none+torch", 4): (799, 66.8),
    ("zero2+full+torch", 16): (None, 35.8),
    ("zero0+full+torch", 8): (2090, 25.5),
    ("zero2+full+liger+torch", 8): (1840, 26.4),  # ~
    ("zero2+none+liger+torch", 8): (1310, 93.0),  # ~
    ("zero2+none+liger+torch", 4): (None, 55.7),
    ("zero2+full+triton", 8): (1800, 26.8),  # ~
    ("zero2+full+liger+triton", 8): (1500, 26.0),  # ~
    ("zero0+full+liger+triton", 8): (1430, 24.2),  # ~
    ("zero2+selective+liger+triton", 8): (1080, 73.9),  # ~
    ("zero2+none+liger+triton", 8): (1050, 93.6),  # ~
}


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
        result = prepared(folder, jobs, args)
        results = Results(args.output, result, read_rows(args.output, result["device"]) if args.append else [])
        before = len(results.rows)
        by_fork = not args.fresh and can_fork(result["capability"] and tuple(result["capability"]))
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
        help="uniform: 2,048 tokens with a picture, 200 of them trained; ragged: as LLaVA's; text: 4,096, no picture",
    )
    parser.add_argument("--layers", type=int, help="of the LLM, the first so many")
    parser.add_argument("--profile", action="store_true", help="two more steps under torch's profiler")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures")
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


def prepared(folder: Path, jobs: list[Job], args: argparse.Namespace) -> dict:
    """Parts and data, made by a process of its own: this one must not start CUDA. Returns the device and versions."""
    before = time.monotonic()
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps({"prepare": asdict(jobs[0])})])
    if done.returncode:
        raise Refusal("E-RUN", "the parts could not be made", found=f"status {done.returncode}", fix="see above")
    seconds = time.monotonic() - before
    print(f"parts and data: {seconds:.0f} s", flush=True)
    result = json.loads((folder / "facts.json").read_text())
    if args.output is None and not args.tiny:
        name = result["device"].lower().replace(" ", "-")
        args.output = ROOT / "benchmarks" / "results" / f"train-{name}.json"
    return result | {"tiny": args.tiny, "seconds_for_parts": round(seconds, 1)}


def run_child(text: str) -> None:
    """What the processes do that are not forked."""
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


def roofline(row: dict, tiny: bool) -> dict | None:
    """What was computed beforehand for this row; the adapters' kernel is Triton's unless it says otherwise."""
    if tiny or row["layers"] or row["lengths"] != "uniform":
        return None
    parsed = Row.parse(row["row"])
    if parsed.base not in STOCK and parsed.kernel is None:
        parsed = replace(parsed, kernel="triton")
    ms, peak = ROOFLINE.get((parsed.name, row["batch"]), (None, None))
    return None if ms is peak is None else {"ms_at_least": ms, "peak_allocated_gib": peak}


class Results:
    """The rows, on disk after every one of them."""

    def __init__(self, output: Path | None, facts: dict, rows: list[dict]):
        self.output, self.facts, self.rows = output, facts, rows

    def add(self, row: dict) -> None:
        if expected := roofline(row, self.facts["tiny"]):
            row["roofline"] = expected
        self.rows.append(row)
        print(table(self.rows, last=True), flush=True)
        if self.output is None:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        part = self.output.with_name(f".{self.output.name}.part")
        part.write_text(json.dumps(self.facts | {"rows": self.rows}, indent=1) + "\n")
        os.replace(part, self.output)
        if "profile" in row:
            file = self.output.with_name(f"{self.output.stem}-profile.txt")
            with file.open("a") as out:
                out.write(profile_text(row))


def read_rows(output: Path, device: str) -> list[dict]:
    """The rows that ``output`` holds.

    Raises:
        Refusal: they are another device's.
    """
    if not output.exists():
        return []
    found = json.loads(output.read_text())
    if found["device"] != device:
        raise Refusal(
            "C-FLAG", "the file is another device's", file=output, key="--append", found=found["device"],
            expected=device, fix="another --output",
        )  # fmt: skip
    return found["rows"]


def setting(row: dict) -> tuple:
    return row["lengths"], row["layers"], row["batch"]


def table(rows: list[dict], last: bool = False) -> str:
    """A line per row, or of the last row alone with more in it; ratios are to the last ``stock`` of the same size."""
    base = {setting(r): r["tokens_per_second"] for r in rows if r["row"] == "stock" and r["status"] == "ok"}
    lines = [f"{'':<36}{'tokens/s':>9}{'MFU':>7}{'GiB':>7}{'reserved':>9}{'× stock':>8}"] if not last else []
    for row in rows[-1:] if last else rows:
        words = [f"{row['row']}@{row['batch']}"]
        words += [row["lengths"]] * (row["lengths"] != "uniform") + [f"{row['layers']} layers"] * bool(row["layers"])
        line = f"{' '.join(words):<36}"
        if row["status"] == "ok":
            line += f"{row['tokens_per_second']:>9.0f}"
            line += f"{row['mfu']:>7.1%}" if "mfu" in row else f"{'':>7}"
            memory = (row.get("peak_allocated_gib"), row.get("peak_reserved_gib"))
            line += "".join(
                f"{'' if gib is None else f'{gib:.1f}':>{width}}" for gib, width in zip(memory, (7, 9), strict=True)
            )
            ratio = row["tokens_per_second"] / base[setting(row)] if setting(row) in base else None
            line += "" if ratio is None else f"{ratio:>8.2f}"
            if last:
                startup = row["startup_seconds"]["until_first_step"]
                line += f"  {row['ms_per_step']:.0f} ms, loss {row['losses'][-1]}, start-up {startup:.0f} s"
        else:
            line += f" {row['status']}: {' '.join(row['message'].split())[:120]}"
        lines.append(line)
    return "\n".join(lines)


def profile_text(row: dict) -> str:
    profile = row["profile"]
    lines = [f"== {row['row']}@{row['batch']} {row['lengths']}, per step: {profile['wall_ms']:.1f} ms"]
    lines[0] += f", of which a kernel runs in {profile['busy_ms']:.1f} ms"
    lines += [f"{g['ms']:>10.2f} ms {g['calls']:>8.0f} × {name}" for name, g in profile["groups"].items()]
    lines += [""]
    lines += [f"{k['ms']:>10.2f} ms {k['calls']:>8.0f} × {k['group']:<20} {k['name']}" for k in profile["kernels"]]
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    run_script(main)
