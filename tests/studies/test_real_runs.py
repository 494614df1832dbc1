"""Studies of real trainings: equal batches for every method, a tiny study from start to end, and killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from llava_moslora.data.collate import Collator
from support.launching import ROOT
from support.text_runs import text_flags, write_alpaca
from support.training_runs import train

METHODS = ("moslora", "lora", "tsmix", "loha")


def digest(batch: dict) -> str:
    """Of the bytes, shapes and dtypes of everything that reaches the model."""
    hashed = hashlib.sha256()
    for name in sorted(batch):
        value = batch[name]
        array = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        hashed.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return hashed.hexdigest()


def test_batches_are_bit_equal_for_every_method_of_a_seed(parts, tmp_path, monkeypatch):
    """Also of a share of the data; another seed has others."""
    original, batches = Collator.__call__, []

    def collate(self, records):
        batches.append(digest(batch := original(self, records)))
        return batch

    monkeypatch.setattr(Collator, "__call__", collate)
    data, seen = write_alpaca(tmp_path / "a.json", 24), {}
    for method, seed in [*((method, 5) for method in METHODS), ("lora", 6)]:
        batches.clear()
        changes = {"method": method, "seed": seed, "data_share": 0.5, "max_steps": 3, "save_strategy": "no"}
        train(parts, tmp_path / f"{method}-{seed}", **text_flags(parts, data, **changes, data_order="shuffle"))
        seen[method, seed] = list(batches)
    assert len(seen["lora", 5]) >= 3 and all(seen[method, 5] == seen["lora", 5] for method in METHODS)
    assert seen["lora", 6] != seen["lora", 5]


@pytest.fixture
def tiny_study(parts, tmp_path):
    """The file of a study of two arms and two seeds, six steps each with validation."""
    data = write_alpaca(tmp_path / "a.json", 64)
    recipe = {
        "model_name_or_path": parts.llm, "data_path": data, "version": "llm_adapters", "lora_r": 4, "max_steps": 6,
        "data_cache": tmp_path / "cache", "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2,
        "validation_split": 0.3, "eval_strategy": "steps", "eval_steps": 3, "dataloader_num_workers": 0,
        "report_to": "none",
    }  # fmt: skip
    study = {
        "recipe": [str(word) for name, value in recipe.items() for word in (f"--{name}", value)],
        "seeds": ["1", "2"],
        "arms": [{"name": "LoRA", "flags": {"method": "lora"}}, {"name": "MoSLoRA"}],
        "measures": [
            {"name": "validation loss", "metric": "eval_loss", "better": "lower"},
            {"name": "accuracy", "metric": "eval_token_accuracy", "better": "higher", "at": "best"},
        ],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(study))
    return tmp_path / "tiny.yaml"


def start(file, output) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), str(file), "--output_dir", str(output)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, env=env, cwd=file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(file, output) -> str:
    out, err = (process := start(file, output)).communicate()
    assert process.returncode == 0, out[-2000:] + err[-2000:]
    return (output / "study.txt").read_text()


@pytest.mark.slow
def test_a_tiny_study_trains_and_compares(tiny_study, tmp_path):
    table = finish(tiny_study, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "study.json").read_text())
    for measure, best in zip(report["measures"], (None, max), strict=True):
        for row in measure["rows"]:
            assert len(row["values"]) == 2 and row["missing"] == []
            for seed, value in row["values"].items():
                log = tmp_path / "out" / "runs" / row["arm"] / f"seed-{seed}" / "run" / "metrics.jsonl"
                logged = [json.loads(line).get(measure["metric"]) for line in log.read_text().splitlines()]
                logged = [number for number in logged if number is not None]
                assert len(logged) == 2 and value == (best(logged) if best else logged[-1])
    assert report["notes"] == [] and "baseline" in table and "accuracy (higher is better)" in table
    assert finish(tiny_study, tmp_path / "out") == table


@pytest.mark.faults
def test_a_study_of_real_runs_killed_at_ten_random_moments_ends_in_the_same_table(tiny_study, tmp_path):
    began = time.monotonic()
    table = finish(tiny_study, tmp_path / "whole")
    seconds, chance = time.monotonic() - began, random.Random(3)
    for _ in range(10):
        process = start(tiny_study, tmp_path / "killed")
        time.sleep(chance.uniform(0, seconds / 2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert finish(tiny_study, tmp_path / "killed") == table
    reports = [json.loads((tmp_path / name / "study.json").read_text())["measures"] for name in ("whole", "killed")]
    assert reports[0] == reports[1]
