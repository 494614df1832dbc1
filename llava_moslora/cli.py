"""The command ``llava-moslora``: runs the scripts, and finds them and the recipes also without a checkout.

    llava-moslora COMMAND [FLAGS]

{commands}
  recipes [NAME]        list the shell recipes; with NAME print its file: bash "$(llava-moslora recipes NAME)"

llava-moslora COMMAND --help shows a command's flags. On several GPUs `train --num_gpus N` starts DeepSpeed's launcher.
"""

from __future__ import annotations

import itertools
import os
import re
import runpy
import sys
from pathlib import Path

from llava_moslora._version import __version__
from llava_moslora.errors import Refusal, did_you_mean, run_script
from llava_moslora.flags import BY_COMMAND

# Command → its script and what it does.
COMMANDS = {
    "train": ("train_vit_llm.py", "fine-tune adapters in the LLM and the vision tower, and the projector"),
    "train-sdxl": ("train_sdxl.py", "teach Stable Diffusion XL a subject from a few pictures"),
    "plan": ("plan.py", "will a training run fit, how long will it take, and which flags are fastest"),
    "prepare": ("prepare_data.py", "check and tokenise data, with a report"),
    "export": ("export.py", "export a run to a format that other tools load"),
    "chat": ("chat.py", "talk to a model in the terminal"),
    "serve": ("serve.py", "talk to a model in a browser"),
    "evaluate": ("evaluate.py", "benchmarks, a question file, or two results compared"),
    "evaluate-commonsense": ("evaluate_commonsense.py", "an LLM on the eight sets of the paper's Table 4 (text only)"),
    "study": ("study.py", "settings × seeds trained, evaluated and compared, with intervals and a verdict"),
    "evaluate-subjects": ("evaluate_subjects.py", "images of a tuned SDXL: generate, score, and have people judge"),
    "convert-adapter": (
        "convert_adapter.py",
        "convert other tools' MoSLoRA adapters to this package's, or to a plain LoRA",
    ),
    "convert-internlm2": ("convert_internlm2.py", "convert an InternLM2 folder to a Llama folder"),
}


def code_root() -> Path:
    """The folder of ``scripts/`` and ``zero_configs/``: the checkout, or inside the installed package."""
    package = Path(__file__).parent
    return package if (package / "scripts").is_dir() else package.parent


def recipes() -> dict[str, Path]:
    """Name → file of every shell recipe."""
    files = sorted((code_root() / "scripts").glob("*.sh"))
    return {file.stem: file for file in files if file.stem not in ("demo", "recipe_defaults")}


def usage() -> str:
    lines = (f"  {name:21} {what}" for name, (_, what) in COMMANDS.items())
    return (__doc__ or "").format(commands="\n".join(lines))


def summary(recipe: Path) -> str:
    """The first sentence of a recipe's comment."""
    lines = itertools.takewhile(lambda line: len(line) > 1, recipe.read_text(encoding="utf-8").splitlines()[1:])
    text = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"\.(?=\s|$)", text)[0] + "."


def print_recipes(names: list[str]) -> None:
    """
    Raises:
        Refusal: C-FLAG, no such recipe, or several.
    """
    known = recipes()
    if not names or names[0] in ("-h", "--help"):
        for name, file in known.items():
            print(f"{name:34} {summary(file)}")
        return
    if len(names) > 1 or names[0].removesuffix(".sh") not in known:
        raise Refusal("C-FLAG", "no such recipe", key="recipes", found=" ".join(names), expected=" | ".join(known))
    print(known[names[0].removesuffix(".sh")])


def run_command(name: str, words: list[str]) -> None:
    """Run a command's script in this process, or ``train --num_gpus N …`` with DeepSpeed's launcher in its place.

    Raises:
        Refusal: C-FLAG, no such command, or no number of GPUs.
    """
    if name not in COMMANDS:
        known = [*COMMANDS, "recipes"]
        fix = did_you_mean(name, known) or "see llava-moslora --help"
        raise Refusal("C-FLAG", "unknown command", found=name, expected=" | ".join(known), fix=fix)
    os.environ[BY_COMMAND] = "1"  # what is said to do next is such a call too
    script = str(code_root() / "scripts" / COMMANDS[name][0])
    if name == "train" and words[:1] in (["--num_gpus"], ["--num-gpus"]):
        if len(words) < 2 or not words[1].isdecimal() or int(words[1]) < 1:
            found = words[1] if len(words) > 1 else "nothing"
            raise Refusal("C-FLAG", "not a number of GPUs", key="--num_gpus", found=found, expected="at least 1")
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        os.execv(launcher, [launcher, "--num_gpus", words[1], "--master_addr", "127.0.0.1", script, *words[2:]])
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def dispatch() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
    elif words[0] in ("-V", "--version"):
        print(__version__)
    elif words[0] == "recipes":
        print_recipes(words[1:])
    else:
        run_command(words[0], words[1:])


def main() -> None:
    """The entry point of the console script."""
    run_script(dispatch)


if __name__ == "__main__":
    main()
