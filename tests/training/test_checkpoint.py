"""Tensors of a checkpoint are read back only if they are what this run trains."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_moslora.errors import Refusal
from llava_moslora.training.checkpoint import (
    OPTIMIZER_FILE,
    PROJECTOR_FILE,
    read_optimizer,
    read_trained,
    write_optimizer,
    write_trained,
)


class Stage1(nn.Module):
    """Trains what a LLaVA's projector is called, and nothing else."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.multi_modal_projector = nn.Linear(3, 2)
        self.lm_head = nn.Linear(2, 2).requires_grad_(False)


@pytest.fixture
def model():
    return Stage1()


@pytest.fixture
def folder(tmp_path, model):
    masters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    write_trained(tmp_path, model, masters)
    write_optimizer(tmp_path, model, made(model, step=3), {"scheduler_steps": 3, "loss_scale": None})
    return tmp_path


def made(model, step: int = 1, moments: float = 0.25) -> dict[str, torch.Tensor]:
    """Adam's state as a run's optimizer makes it."""
    state = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state |= {f"{name}.{key}": torch.full(p.shape, moments) for key in ("exp_avg", "exp_avg_sq")}
            state[f"{name}.step"] = torch.tensor(float(step), dtype=torch.float64)
    return state


def test_read_back_as_written(folder, model):
    read = read_trained(folder, model)
    assert set(read) == {"model.multi_modal_projector.weight", "model.multi_modal_projector.bias"}
    assert torch.equal(read["model.multi_modal_projector.weight"], model.model.multi_modal_projector.weight)
    state, position = read_optimizer(folder, made(model, moments=0.0))
    assert {name: float(t.sum()) for name, t in state.items()} == {n: float(t.sum()) for n, t in made(model, 3).items()}
    assert position == {"scheduler_steps": 3, "loss_scale": None, "not_stepped": []}


def test_a_checkpoint_of_the_first_versions_is_read(folder, model):
    """They had Adam alone, and its count of steps in position.json."""
    moments = {name: t for name, t in made(model).items() if not name.endswith(".step")}
    save_file(moments, folder / OPTIMIZER_FILE)
    (folder / "position.json").write_text('{"adam_steps": 3, "scheduler_steps": 4, "loss_scale": null}')
    state, position = read_optimizer(folder, made(model, moments=0.0))
    assert {name: float(t.sum()) for name, t in state.items()} == {n: float(t.sum()) for n, t in made(model, 3).items()}
    assert position["scheduler_steps"] == 4


def test_what_was_not_stepped_has_no_state(folder, model):
    """As of fp16 before its loss scale is found, or of a vision tower that has met no image yet."""
    name = "model.multi_modal_projector.bias"
    state = {key: t for key, t in made(model, 3).items() if not key.startswith(name)}
    write_optimizer(folder, model, state, {"scheduler_steps": 3, "loss_scale": None})
    read, position = read_optimizer(folder, made(model))
    assert position["not_stepped"] == [name] and set(read) == set(state)
    write_optimizer(folder, model, {}, {"scheduler_steps": 3, "loss_scale": None})
    assert read_optimizer(folder, made(model))[0] == {}


def change(file, how) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if "weight" in name and tensors[name].dim() == 2)
    how(tensors, name)
    save_file(tensors, file)


WRONG = {
    "missing": (lambda t, n: t.pop(n), "not the tensors that this run trains; found .*weight"),
    "extra": (lambda t, n: t.update(more=torch.zeros(1)), "not the tensors that this run trains; found more"),
    "shape": (lambda t, n: t.update({n: torch.zeros(2, 4)}), r"another shape; found \[2, 4\]; expected \[2, 3\]"),
    "zero-size": (lambda t, n: t.update({n: torch.zeros(0)}), r"another shape; found \[0\]; expected \[2, 3\]"),
    "dtype": (lambda t, n: t.update({n: t[n].half()}), "another dtype; found torch.float16; expected torch.float32"),
    "NaN": (lambda t, n: t[n].fill_(float("nan")), "values that are not finite; fix: resume from an older"),
    "Inf": (lambda t, n: t[n].fill_(float("inf")), "values that are not finite"),
}


# K12: missing, extra or damaged tensors
@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("file", [PROJECTOR_FILE, OPTIMIZER_FILE])
def test_wrong_tensors_are_named(folder, model, case, file):
    how, message = WRONG[case]
    change(folder / file, how)
    with pytest.raises(Refusal, match=message) as refusal:
        read_trained(folder, model), read_optimizer(folder, made(model))
    assert refusal.value.code == "K-TENSOR" and refusal.value.exit_status == 3 and file in str(refusal.value)


def test_a_missing_file_is_named(folder, model):
    (folder / OPTIMIZER_FILE).unlink()
    with pytest.raises(Refusal, match=r"optimizer.safetensors: no such file in the checkpoint"):
        read_optimizer(folder, made(model))
