"""Start-up time of the commands: ``--help``, a mistyped flag, ``import llava_moslora``.

    python benchmarks/start.py                        # next to the import of torch, transformers and PEFT
    python benchmarks/start.py --before OLD_CHECKOUT  # and next to the same commands of another checkout

Each measurement is a separate process, interleaved; the results are medians of CPU time (user and system), which other
processes on the machine do not affect.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 1.5  # at most, of CPU time
SCRIPTS = ("train_vit_llm", "prepare_data", "export", "chat", "serve", "evaluate")
LIBRARIES = [sys.executable, "-c", "import torch, transformers, peft"]


def commands() -> dict[str, list[str]]:
    """Answer → command, to be run in a checkout."""
    found = {"import llava_moslora": [sys.executable, "-c", "import llava_moslora"]}
    for script in SCRIPTS:
        found[f"{script}.py --help"] = [sys.executable, f"scripts/{script}.py", "--help"]
        found[f"{script}.py --ouptut_dir x"] = [sys.executable, f"scripts/{script}.py", "--ouptut_dir", "x"]
    return found


def seconds(command: list[str], folder: Path) -> tuple[float, float]:
    """CPU and wall time of a process and its children."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    sides = {"libraries": (LIBRARIES, ROOT)}
    for name, command in commands().items():
        sides[name] = command, ROOT
        if args.before is not None:
            sides[f"{name}, before"] = command, args.before.resolve()
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.repeats + 1):
        for name, (command, folder) in sides.items():
            measured[name].append(seconds(command, folder))
    medians = {
        name: [statistics.median(part) for part in zip(*runs[1:], strict=True)]  # without the first: cold files
        for name, runs in measured.items()
    }
    libraries = medians["libraries"][0]
    print(f"importing torch, transformers and PEFT: {libraries:.2f} s of CPU time")
    rows = {}
    for name in commands():
        cpu, wall = medians[name]
        rows[name] = {
            "cpu_seconds": round(cpu, 3),
            "wall_seconds": round(wall, 3),
            "of_libraries": round(cpu / libraries, 4),
        }
        line = f"{name:34} {cpu:6.2f} s   {cpu / libraries:5.1%} of that"
        if (old := medians.get(f"{name}, before")) is not None:
            rows[name] |= {"before_cpu_seconds": round(old[0], 3), "before_wall_seconds": round(old[1], 3)}
            line += f"   before {old[0]:6.2f} s: {old[0] / cpu:5.1f} × as fast now"
        print(line)
    slow = [name for name, row in rows.items() if row["cpu_seconds"] > SECONDS]
    result = {"machine": machine(), "repeats": args.repeats, "libraries_cpu_seconds": round(libraries, 3)}
    result |= {"at_most_seconds": SECONDS, "answers": rows}
    (ROOT / "benchmarks" / "results" / "start.json").write_text(json.dumps(result, indent=1) + "\n")
    if slow:
        sys.exit(f"slower than {SECONDS} s: {', '.join(slow)}")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor() or platform.machine()}"


if __name__ == "__main__":
    main()
