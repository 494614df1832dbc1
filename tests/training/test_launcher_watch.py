"""The death of the deepspeed command is noticed by the ranks, which its signals do not reach."""

import os
import re
import subprocess
import sys

import psutil
import pytest

from llava_moslora.training.launcher_watch import LAUNCH, LauncherWatch, job
from support.launching import ROOT

RANK = """
import sys, time
from llava_moslora.training.launcher_watch import LauncherWatch, job
watch = LauncherWatch()
print("watching" if watch.launch else "nobody", watch.died(), job(), flush=True)
until = time.monotonic() + 20
while not watch.died() and time.monotonic() < until:
    time.sleep(0.01)
print("died" if watch.died() else "lives", flush=True)
"""


def command(tmp_path, name: str, module: str) -> subprocess.Popen:
    """A process tree as DeepSpeed's: a command, what it starts with ``-m`` and waits for, and a rank."""
    package = tmp_path.joinpath(*module.split(".")[:-1])
    package.mkdir(parents=True)
    for folder in (package, *package.parents):  # else the installed package would be found first
        if folder.is_relative_to(tmp_path) and folder != tmp_path:
            (folder / "__init__.py").touch()
    start = "import subprocess, sys; subprocess.Popen({words}).wait()"
    (package / f"{module.rpartition('.')[2]}.py").write_text(start.format(words=f"[sys.executable, '-c', {RANK!r}]"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / name).write_text(start.format(words=f"[sys.executable, '-m', {module!r}]"))
    words = [sys.executable, f"bin/{name}"]
    return subprocess.Popen(
        words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def test_the_commands_death_is_noticed(tmp_path):
    with command(tmp_path, "deepspeed", LAUNCH) as process:
        launcher = re.fullmatch(r"watching False the launcher (\d+)\n", process.stdout.readline())
        assert int(launcher[1]) in [child.pid for child in psutil.Process(process.pid).children()]
        process.terminate()
        process.wait()
        assert process.stdout.readline() == "died\n"


def test_the_death_of_what_it_has_started_too(tmp_path):
    with command(tmp_path, "deepspeed", LAUNCH) as process:
        assert process.stdout.readline().startswith("watching False")
        psutil.Process(process.pid).children()[0].kill()
        assert process.stdout.readline() == "died\n"


def test_other_parents_are_not_watched(tmp_path):
    assert LauncherWatch().launch is None and not LauncherWatch().died()
    with command(tmp_path, "torchrun", "launcher.launch") as process:
        assert process.stdout.readline() == "nobody False \n"
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()


def test_slurm_names_its_steps(monkeypatch):
    assert job() == ""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    assert job() == ""
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert job() == "Slurm's step 41.0"
