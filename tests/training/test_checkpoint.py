"""Tensors of a checkpoint are read back only if they are what this run trains."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llava_moslora.errors import Refusal
from llava_moslora.training.checkpoint import MOMENTS_FILE, PROJECTOR_FILE, read_optimizer, read_trained, write_trained


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
    moments = {f"{name}.{key}": torch.rand_like(t) for name, t in masters.items() for key in ("exp_avg", "exp_avg_sq")}
    save_file(moments, tmp_path / MOMENTS_FILE)
    (tmp_path / "position.json").write_text('{"adam_steps": 3, "scheduler_steps": 3, "loss_scale": null}')
    return tmp_path


def test_read_back_as_written(folder, model):
    read = read_trained(folder, model)
    assert set(read) == {"model.multi_modal_projector.weight", "model.multi_modal_projector.bias"}
    assert torch.equal(read["model.multi_modal_projector.weight"], model.model.multi_modal_projector.weight)
    moments, position = read_optimizer(folder, model)
    assert len(moments) == 4 and position["adam_steps"] == 3


def change(file, how) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if "weight" in name)
    how(tensors, name)
    save_file(tensors, file)


WRONG = {
    "missing": (lambda t, n: t.pop(n), "not the tensors that this run trains; found .*weight"),
    "extra": (lambda t, n: t.update(more=torch.zeros(1)), "not the tensors that this run trains; found more"),
    "shape": (lambda t, n: t.update({n: torch.zeros(2, 4)}), r"another shape; found \[2, 4\]; expected \[2, 3\]"),
    "zero-size": (lambda t, n: t.update({n: torch.zeros(0)}), r"another shape; found \[0\]; expected \[2, 3\]"),
    "dtype": (lambda t, n: t.update({n: t[n].half()}), "another dtype; found torch.float16; expected torch.float32"),
    "NaN": (lambda t, n: t[n].fill_(float("nan")), "numbers that are not finite; fix: resume from an older"),
    "Inf": (lambda t, n: t[n].fill_(float("inf")), "numbers that are not finite"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("file", [PROJECTOR_FILE, MOMENTS_FILE])
def test_wrong_tensors_are_named(folder, model, case, file):
    how, message = WRONG[case]
    change(folder / file, how)
    with pytest.raises(Refusal, match=message) as refusal:
        read_trained(folder, model), read_optimizer(folder, model)
    assert refusal.value.code == "K-TENSOR" and refusal.value.exit_status == 3 and file in str(refusal.value)


def test_a_missing_file_is_named(folder, model):
    (folder / MOMENTS_FILE).unlink()
    with pytest.raises(Refusal, match=r"optimizer.safetensors: no such file in the checkpoint"):
        read_optimizer(folder, model)
