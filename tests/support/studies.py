"""Studies whose training is a stub without torch: the study's own machinery in seconds, with real processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 8
RECIPE = ["--model_name_or_path", "llm", "--data_path", "a.json", "--lora_r", "4", "--learning_rate", "1e-3",
          "--validation_split", "0.1", "--eval_strategy", "steps"]  # fmt: skip
LORA = {"mixer_init": "identity", "train_mixer": "False"}
LOSS = {"name": "validation loss", "metric": "eval_loss", "better": "lower"}
# scripts/study.py with this file in the place of the training script.
STUDY = f"""
import runpy, sys
from llava_moslora.studies import processes
processes.TRAINING = (sys.executable, {__file__!r})
runpy.run_path({str(ROOT / "scripts" / "study.py")!r}, run_name="__main__")
"""


def study_of(**changes) -> dict:
    """Two arms, two seeds; None leaves a key out."""
    arms = [{"name": "LoRA", "flags": LORA}, {"name": "MoSLoRA"}]
    study = {"recipe": RECIPE, "seeds": ["1", "2"], "arms": arms, "measures": [LOSS]} | changes
    return {key: value for key, value in study.items() if value is not None}


def write_study(folder: Path, **changes) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(study_of(**changes)))  # JSON is YAML
    return file


def command(file: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, "-c", STUDY, str(file), "--output_dir", str(output), *more]


def run_study(file: Path, output: Path, *more: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        command(file, output, *more), capture_output=True, text=True, env=env, cwd=file.parent, timeout=300
    )


def in_process(monkeypatch, file: Path, output: Path, *more: str) -> None:
    """``scripts/study.py`` in this process; its trainings are processes."""
    import scripts.study
    from llava_moslora.studies import processes

    monkeypatch.setattr(processes, "TRAINING", (sys.executable, __file__))
    monkeypatch.setattr(processes, "POLL", 0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "argv", ["study.py", str(file), "--output_dir", str(output), *more])
    scripts.study.main()


def loss(flags: dict[str, str], step: int) -> float:
    """What the stub logs: the seed's own part is the same for both arms, as with equal batches."""
    seed = 0.1 * chance(f"seed {flags['seed']}")
    arm = 0.02 * chance(f"{flags.get('mixer_init')} {flags['seed']} {flags['learning_rate']} {flags['lora_r']}")
    return 2 + seed + arm - 0.01 * step


def chance(text: str) -> float:
    """A number in [0, 1) of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def main() -> None:
    """Rows of metrics.jsonl, a step each; goes on after the last complete row. A learning rate above 1 diverges, rank
    13 crashes, and rank 17 crashes unless ``STUB_MENDED`` is set."""
    words = sys.argv[1:]
    flags = {word[2:]: words[k + 1] for k, word in enumerate(words) if word.startswith("--")}
    if float(flags["learning_rate"]) > 1:
        print("error[R-NONFINITE] step 3: the loss became NaN", file=sys.stderr)
        sys.exit(5)
    if flags["lora_r"] == "13" or (flags["lora_r"] == "17" and "STUB_MENDED" not in os.environ):
        print("warming up\nerror[E-MEMORY] the memory of the device is not enough\nbye", file=sys.stderr)
        sys.exit(4)
    file = Path(flags["output_dir"]) / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    file.write_text("".join(f"{line}\n" for line in lines))
    for step in range(len(lines) + 1, STEPS + 1):
        time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
        row = {"step": step, "loss": loss(flags, step)} | ({"eval_loss": loss(flags, step)} if step % 4 == 0 else {})
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
