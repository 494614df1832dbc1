"""An evaluation on two ranks, killed while it asks: nothing is lost or asked twice, and the results are the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.export_runs import trained_run
from support.golden_cases import tiny_files
from support.launching import ROOT, free_port, run

pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("KILLS", "10"))
SEED = 17


def lines(folder: Path) -> list[str]:
    """Every whole line of answers, of all benchmarks and ranks, as it is in the file."""
    files = sorted(folder.glob("*/answers-*.jsonl"))
    whole = [f"{file.parent.name} {line.decode()}" for file in files for line in file.read_bytes().split(b"\n")[:-1]]
    return [line for line in whole if '{"header": ' not in line]


def killed_after(command: list[str], output: Path, count: int, wait: float) -> int:
    """Start ``command`` and kill it, with all its processes at once, ``wait`` seconds after the folder holds ``count``
    answers; returns how many it then holds.

    The ranks have sessions of their own, so that the launcher's process group alone would let them live.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(lines(output)) < count:
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read()[-3000:]
    time.sleep(wait)
    everything = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(everything) >= 3
    for one in everything:
        one.send_signal(signal.SIGKILL)
    psutil.wait_procs(everything[1:])
    assert process.wait() == -signal.SIGKILL
    return len(lines(output))


def test_killed_while_asking(parts, tmp_path):
    chance = random.Random(SEED)
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    for name, (text, _) in tiny_files(random.Random(0)).items():
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    words = ["--benchmark", "mme,mmbench_en,textvqa", "--data", tmp_path, "--batch_size", "2", "--output"]
    words = ["scripts/evaluate.py", tmp_path / "run", *words]
    done = run([sys.executable, *words, tmp_path / "one"])
    assert done.returncode == 0, done.stderr[-3000:]
    expected = sorted(lines(tmp_path / "one"))

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command = [*torchrun, str(free_port()), *map(str, words), str(tmp_path / "two")]
    answered = [0]
    for kill in range(KILLS):
        rest = len(expected) - answered[-1]
        count = answered[-1] + chance.randint(1, max(1, rest // (KILLS - kill + 1)))
        answered.append(killed_after(command, tmp_path / "two", count, chance.uniform(0, 0.05)))
        assert answered[-1] < len(expected), "it was killed after the last answer"
    print(f"{KILLS} kills after {answered[1:]} of {len(expected)} answers")

    done = run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    found = lines(tmp_path / "two")
    assert len(found) == len(expected) and sorted(found) == expected  # each once, and the same text
    assert done.stdout == (tmp_path / "one" / "results.md").read_text().split("\n\n", 1)[1]
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0] == results[1]
