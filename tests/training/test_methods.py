"""Every adapter method: trained, killed, resumed to the same bytes, loaded, and exported with its proof."""

import json
import shutil

import pytest

from llava_moslora.config import ADAPTER_METHODS
from support.text_runs import text_flags, write_alpaca
from support.training_runs import losses, train

FILES = ["adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json"]
SAME_IN_BOTH_TOWERS = {"vision_lora_r": 4, "lora_alpha": 8, "vision_lora_alpha": 8}


def settings(method: str) -> dict:
    """Ranks and alphas that differ between the towers, where the method can have such."""
    return {"method": method} | (SAME_IN_BOTH_TOWERS if method == "adalora" else {})


def resumed_to_the_same_bytes(parts, folder, steps: int, **same) -> None:
    """``folder/run`` trains to the end; ``folder/again`` as if it were killed after half of the steps."""
    run, again = folder / "run", folder / "again"
    same |= {"save_steps": steps // 2, "resume": True, "max_steps": steps}
    train(parts, run, **same)
    shutil.copytree(run, again)
    shutil.rmtree(again / f"checkpoint-{steps}")
    train(parts, again, **same)
    for file in FILES:
        assert (again / f"checkpoint-{steps}" / file).read_bytes() == (
            run / f"checkpoint-{steps}" / file
        ).read_bytes(), file
    assert losses(again)[-(steps // 2) :] == losses(run)[-(steps // 2) :]
    assert json.loads((run / "run.json").read_text())["settings"]["adapter"]["method"] == same["method"]


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_a_llava(parts, tmp_path, monkeypatch, method):
    resumed_to_the_same_bytes(parts, tmp_path, 4, **settings(method))


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_an_llm(parts, tmp_path, monkeypatch, method):
    data = write_alpaca(tmp_path / "alpaca.json")
    resumed_to_the_same_bytes(parts, tmp_path, 4, **text_flags(parts, data, method=method))
