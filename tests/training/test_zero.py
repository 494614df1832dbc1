"""Every ZeRO configuration on two ranks: the losses of plain PyTorch, resume in the same bytes, no rank waiting."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from launching import ROOT, flags, launch, run

pytestmark = pytest.mark.slow
STEPS = 6


def configuration(name: str, folder: Path) -> Path:
    """A file of zero_configs/, with buckets for tiny models and every parameter really partitioned."""
    config = json.loads((ROOT / "zero_configs" / f"{name}.json").read_text())
    config["zero_optimization"]["reduce_bucket_size"] = 5e5
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / f"{name}.json").write_text(json.dumps(config))
    return folder / f"{name}.json"


def settings(parts, run_folder: Path, **changes) -> list[str]:
    """Every third record is text only, in random order: ranks meet batches with and without pictures."""
    same = {"max_steps": STEPS, "save_steps": 3, "data_order": "shuffle", "vision_lora_r": 3, "mm_projector_lr": 1e-3}
    return flags(parts, run_folder, **(same | changes))


def losses(run_folder: Path) -> list[float]:
    state = json.loads((run_folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


@pytest.fixture(scope="module")
def plain(parts, tmp_path_factory) -> Path:
    """One process without DeepSpeed, the same global batches, float32, no dropout."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    exact = {"lora_dropout": 0, "vision_lora_dropout": 0, "per_device_train_batch_size": 4}
    done = run([sys.executable, "scripts/train_vit_llm.py", *settings(parts, folder, **exact)])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_two_ranks_lose_what_one_process_loses(parts, plain, tmp_path, name):
    folder = tmp_path / "run"
    exact = {"lora_dropout": 0, "vision_lora_dropout": 0}
    launch(settings(parts, folder, deepspeed=configuration(name, tmp_path), **exact))
    assert losses(folder) == pytest.approx(losses(plain), rel=5e-6)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_resumed_run_ends_in_the_same_bytes(parts, tmp_path, name):
    """bf16 and dropout; ZeRO-2 is in the default tier."""
    folder, again = tmp_path / "run", tmp_path / "again"
    same = {"deepspeed": configuration(name, tmp_path), "bf16": True}
    launch(settings(parts, folder, **same))
    shutil.copytree(folder, again)
    shutil.rmtree(again / f"checkpoint-{STEPS}")
    launch(settings(parts, again, resume=True, **same))
    for file in ["adapter/adapter_model.safetensors", "optimizer.safetensors", "random-0.json", "random-1.json"]:
        last = Path(f"checkpoint-{STEPS}") / file
        assert (folder / last).read_bytes() == (again / last).read_bytes(), file


def test_one_stage_and_world_size_goes_on_where_another_stopped(parts, plain, tmp_path):
    """Two ranks under ZeRO-3 for three steps, then one process without DeepSpeed: the plain run's losses."""
    folder = tmp_path / "run"
    exact = {"lora_dropout": 0, "vision_lora_dropout": 0}
    launch(settings(parts, folder, deepspeed=configuration("zero3", tmp_path), **exact))
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    alone = settings(parts, folder, resume=True, per_device_train_batch_size=4, **exact)
    done = run([sys.executable, "scripts/train_vit_llm.py", *alone])
    assert done.returncode == 0, done.stderr
    assert losses(folder) == pytest.approx(losses(plain), rel=5e-6)
