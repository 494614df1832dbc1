"""The training flags of a recipe: the script is run with fake launchers that only record them."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llava_moslora.errors import Refusal

LAUNCHERS = ("deepspeed", "torchrun", "srun")
TRAINING = "train_vit_llm.py"
SECONDS = 30
STUB = """#!{python}
import json, os, sys
json.dump({{"argv": sys.argv, "folder": os.getcwd()}}, open({answer!r}, "w"))
"""


@dataclass(frozen=True)
class Call:
    """How a recipe starts training: flags, total GPUs of all hosts if the launcher states them, working directory."""

    flags: list[str]
    gpus: int | None
    folder: Path


def read_recipe(script: Path, gpus: int | None) -> Call:
    """
    Args:
        gpus: given to the recipe as ``GPUS``.

    Raises:
        Refusal: C-PATH, no such script; C-RECIPE, it fails, or starts no training of this package.
    """
    if not script.is_file():
        raise Refusal(
            "C-PATH", "no such file", file=script, key="--config", fix="a recipe, a YAML file or a run folder"
        )
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "call.json"
        for name in LAUNCHERS:
            stub = Path(folder) / name
            stub.write_text(STUB.format(python=sys.executable, answer=str(answer)))
            stub.chmod(0o755)
        environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
        if gpus is not None:
            environment["GPUS"] = str(gpus)
        try:
            done = subprocess.run(
                ["bash", str(script)], env=environment, capture_output=True, text=True, errors="replace",
                timeout=SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refusal("C-RECIPE", "cannot be run", file=script, found=error) from error
        if done.returncode or not answer.is_file():
            said = (done.stderr.strip().splitlines() or ["no launcher is called"])[-1]
            what = "the recipe does not start training"
            fix = f"give a script that calls {', '.join(LAUNCHERS[:2])} on scripts/{TRAINING}"
            raise Refusal("C-RECIPE", what, file=script, found=said, fix=fix)
        call = json.loads(answer.read_text())
    words = [word for argument in call["argv"] for word in ([argument] if " " not in argument else argument.split())]
    at = next((i for i, word in enumerate(words) if word.endswith(TRAINING)), None)
    if at is None:
        raise Refusal(
            "C-RECIPE", "the recipe starts another script", file=script, found=" ".join(words[1:4]),
            expected="train_vit_llm.py: other scripts cannot be planned",
        )  # fmt: skip
    launcher, flags = words[:at], words[at + 1 :]
    return Call(flags, _gpus(launcher, script, Path(call["folder"]), given=gpus), Path(call["folder"]))


PER_HOST = ("--num_gpus", "--num_accelerators", "--nproc_per_node")


def _gpus(launcher: list[str], script: Path, folder: Path, given: int | None) -> int | None:
    """Of all hosts: ``--num_gpus`` or ``--nproc_per_node`` times ``--nnodes``, or the slots of ``--hostfile``.

    Raises:
        Refusal: C-RECIPE, several hosts whose number, or whose GPUs, the call does not say, and nothing was ``given``.
    """
    flags = dict(itertools.pairwise(launcher))
    per_host, hosts = next((flags[name] for name in PER_HOST if name in flags), None), flags.get("--nnodes", "1")
    if (file := flags.get("--hostfile")) is not None:
        try:
            lines = (folder / file).read_text().splitlines()
        except OSError as error:
            raise Refusal("C-PATH", "no such file", file=folder / file, key="--hostfile") from error
        slots = [int(n) for line in lines for n in re.findall(r"^\s*[^#\s]+\s+slots\s*=\s*(\d+)", line)]
        if slots and not flags.keys() & {"--include", "--exclude", "-i", "-e"}:
            limit = flags.get("--num_nodes", "")
            slots = slots[: int(limit)] if limit.isdecimal() and int(limit) > 0 else slots
            return sum(min(n, int(per_host)) if per_host is not None and int(per_host) > 0 else n for n in slots)
        hosts = "?"
    if per_host is None and "--hostfile" not in flags:
        return None
    hosts = os.path.expandvars(hosts)  # SLURM's are filled in on the hosts
    if per_host is not None and per_host.isdecimal() and hosts.isdecimal():
        return int(per_host) * int(hosts)
    if given is not None:
        return None  # counts in place of the recipe's
    what = "the number of GPUs is not known"
    raise Refusal("C-RECIPE", what, file=script, found=f"{hosts} hosts", fix="give --gpus, of all hosts together")
