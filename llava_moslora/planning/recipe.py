"""The flags that a recipe starts a training with: the script is run with launchers that only write them down."""

from __future__ import annotations

import itertools
import json
import os
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
    """How a recipe starts a training: flags, GPUs per host where the launcher says it, and the folder it does so in."""

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
                ["bash", str(script)], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Refusal("C-RECIPE", "cannot be run", file=script, found=error) from error
        if done.returncode or not answer.is_file():
            said = (done.stderr.strip().splitlines() or ["no launcher is called"])[-1]
            what = "the recipe starts no training"
            fix = f"give a script that calls {', '.join(LAUNCHERS[:2])} on scripts/{TRAINING}"
            raise Refusal("C-RECIPE", what, file=script, found=said, fix=fix)
        call = json.loads(answer.read_text())
    words = [word for argument in call["argv"] for word in ([argument] if " " not in argument else argument.split())]
    at = next((i for i, word in enumerate(words) if word.endswith(TRAINING)), None)
    if at is None:
        raise Refusal("C-RECIPE", "the recipe starts something else", file=script, found=" ".join(words[1:4]))
    launcher, flags = words[:at], words[at + 1 :]
    gpus, hosts = _number_after(launcher, PER_HOST), _number_after(launcher, ("--nnodes",))
    return Call(flags, gpus and gpus * (hosts or 1), Path(call["folder"]))


PER_HOST = ("--num_gpus", "--num_accelerators", "--nproc_per_node")


def _number_after(words: list[str], flags: tuple[str, ...]) -> int | None:
    found = [value for flag, value in itertools.pairwise(words) if flag in flags]
    return int(found[0]) if found and found[0].isdecimal() else None
