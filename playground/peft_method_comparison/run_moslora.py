"""MoSLoRA in PEFT's own benchmark of methods, MetaMathQA: one of the experiments here, through PEFT's runner.

    git clone https://github.com/huggingface/peft && pip install -e peft bitsandbytes datasets
    python playground/peft_method_comparison/run_moslora.py peft/method_comparison/MetaMathQA llama-3.2-3B-rank32 -v

The runner reads ``experiments/METHOD/NAME/adapter_config.json`` and knows only the methods of PEFT. This script puts
the experiment into its folder, imports this package, which registers MOSLORA, and hands over to the runner's ``run.py``
with the flags that are left. With ``--write`` it writes the experiments of this folder again instead.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import sys
from pathlib import Path

from llava_moslora import MosLoraConfig
from llava_moslora.errors import Refusal, run_script
from llava_moslora.files.disk import write_json

EXPERIMENTS = Path(__file__).parent / "experiments" / "moslora"
# As PEFT's own experiments with LoRA of rank 32, and with its default targets (Llama: q_proj and v_proj)
COMMON = {"r": 32, "lora_alpha": 64, "task_type": "CAUSAL_LM"}
# name → the mixer, and what differs from PEFT's default_training_params.json. A kaiming mixer makes B's first gradients
# 0.58 times as large as LoRA's: 1e-4, which is tuned for LoRA, alone would not be a fair comparison.
CONFIGURATIONS: dict[str, tuple[dict, dict]] = {
    "llama-3.2-3B-rank32": ({}, {}),
    "llama-3.2-3B-rank32-lr_0.0002": ({}, {"optimizer_kwargs": {"lr": 2e-4, "weight_decay": 0.1}}),
    "llama-3.2-3B-rank32-orthogonal": ({"mixer_init": "orthogonal"}, {}),
    "llama-3.2-3B-rank32-frozen-mixer": ({"train_mixer": False}, {}),
}


def write_experiments(folder: Path) -> None:
    """Write ``folder``/NAME/adapter_config.json, and training_params.json where it differs from PEFT's defaults."""
    for name, (mixer, parameters) in CONFIGURATIONS.items():
        MosLoraConfig(**COMMON, **mixer).save_pretrained(str(folder / name))
        if parameters:
            write_json(folder / name / "training_params.json", parameters)


def put_experiment(name: str, runner: Path) -> str:
    """Copy an experiment into the runner's folder; its path there, as the runner wants it.

    Raises:
        Refusal: C-FLAG for an unknown experiment or a folder without PEFT's runner.
    """
    if name not in CONFIGURATIONS:
        raise Refusal("C-FLAG", "unknown", key="experiment", found=name, expected=" | ".join(CONFIGURATIONS))
    if not (runner / "run.py").is_file():
        raise Refusal(
            "C-FLAG", "PEFT's runner is not there", file=runner / "run.py", key="runner",
            fix="git clone https://github.com/huggingface/peft, then name peft/method_comparison/MetaMathQA",
        )  # fmt: skip
    path = Path("experiments") / "moslora" / name
    shutil.copytree(EXPERIMENTS / name, runner / path, dirs_exist_ok=True)
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runner", type=Path, nargs="?", help="peft/method_comparison/MetaMathQA of a checkout")
    parser.add_argument("experiment", nargs="?", default="llama-3.2-3B-rank32", help=" | ".join(CONFIGURATIONS))
    parser.add_argument("--write", action="store_true", help="write the experiments of this folder, run nothing")
    args, flags = parser.parse_known_args()
    if args.write:
        write_experiments(EXPERIMENTS)
        return
    if args.runner is None:
        raise Refusal("C-FLAG", "missing", key="runner", expected="peft/method_comparison/MetaMathQA of a checkout")
    experiment = put_experiment(args.experiment, args.runner)
    os.chdir(args.runner)  # the runner keeps its files next to itself
    sys.argv = ["run.py", *flags, experiment]
    sys.path.insert(0, os.getcwd())  # its own modules are utils and data
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    run_script(main)
