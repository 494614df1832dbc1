"""What the paper states about MoSLoRA, as tests. Its A·W·B, for row vectors, is B·W·A in torch's orientation."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.kernel import low_rank_update
from llava_moslora.adapters.layers import init_mixer
from support.adapter_models import IDENTITY, Pair, adapted

R, I, O = 8, 24, 20  # noqa: E741


def weights(mixer="kaiming_uniform"):
    """A, W, B in fp64 at the start of training: A random, B zero."""
    torch.manual_seed(0)
    a, w, b = torch.randn(R, I, dtype=torch.float64), torch.empty(R, R, dtype=torch.float64), torch.zeros(O, R).double()
    init_mixer(w, mixer)
    return a.requires_grad_(), w.requires_grad_(), b.requires_grad_()


def sgd(a, w, b, train_mixer, steps=20, lr=0.05):
    """ΔW after each step of plain SGD on a regression, W frozen or learned; ``w`` None is LoRA."""
    torch.manual_seed(1)
    x, y = torch.randn(40, I).double(), torch.randn(40, O).double()
    trained = [a, b, *([w] if train_mixer else [])]
    history = []
    for _ in range(steps):
        loss = (low_rank_update(torch.zeros(40, O).double(), x, a, w, b, 1.0) - y).square().mean()
        for parameter, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.data.sub_(lr * grad)
        history.append((b @ (a if w is None else w @ a)).detach())
    return history


def as_lora(a, w, b):
    """LoRA started from A' = W·A (App. E.2)."""
    return (w @ a).detach().requires_grad_(), None, b.detach().clone().requires_grad_()


def distance(first, second):
    return max(((f - s).norm() / s.norm()).item() for f, s in zip(first, second, strict=True))


def test_appendix_c_a_zero_mixer_never_trains():
    """W = 0 and B = 0: the gradients of A, W and B are all zero (eq. 9), so the configuration refuses it."""
    a, w, b = weights()
    w.data.zero_()
    torch.manual_seed(1)
    y = low_rank_update(torch.zeros(5, O).double(), torch.randn(5, I).double(), a, w, b, 1.0)
    assert all(not grad.any() for grad in torch.autograd.grad((y - 1).square().sum(), [a, w, b]))


def test_appendix_e4_a_frozen_orthogonal_mixer_is_lora():
    """Under SGD it follows LoRA started from A' = W·A, step for step (eq. 18)."""
    start = weights("orthogonal")
    assert torch.allclose(start[1] @ start[1].T, torch.eye(R).double(), atol=1e-12)
    lora = sgd(*as_lora(*start), train_mixer=False)
    assert distance(sgd(*start, train_mixer=False), lora) <= 1e-12


@pytest.mark.parametrize("mixer, train", [("orthogonal", True), ("kaiming_uniform", True), ("kaiming_uniform", False)])
def test_equation_17_a_learned_or_skewed_mixer_is_not(mixer, train):
    start = weights(mixer)
    lora = sgd(*as_lora(*start), train_mixer=False)
    mixed = sgd(*start, train_mixer=train)
    assert distance(mixed[:1], lora[:1]) <= 1e-12  # B is still zero: only B moves in the first step
    assert distance(mixed, lora) > 1e-3


def test_equation_6_two_subspaces_mixing():
    """The frozen butterfly computes x·(A₁+A₂)·(B₁+B₂) of the two halves of the rank (eq. 3)."""
    layer = adapted(Pair(), mixer_init="butterfly", train_mixer=False).base_model.model.up
    a, _, b = layer.adapter_weights("default")
    x, h = torch.randn(5, 64), R // 2
    halves = x @ (a[:h] + a[h:]).T @ (b[:, :h] + b[:, h:]).T
    assert torch.allclose(layer(x), layer.base_layer(x) + 1.5 * halves, atol=1e-5)


@pytest.mark.parametrize("settings, count", [(IDENTITY, R), ({"mixer_init": "butterfly"}, 2 * R), ({}, R * R)])
def test_table_2_number_of_mixed_subspaces(settings, count):
    """ΔW = s·Σᵢⱼ wᵢⱼ·Bᵢ·Aⱼ: so many rank-1 subspaces Bᵢ·Aⱼ take part."""
    layer = adapted(Pair(), **settings).base_model.model.up
    a, w, b = layer.adapter_weights("default")
    w = torch.eye(R) if w is None else w
    taking_part = [(i, j) for i in range(R) for j in range(R) if w[i, j] != 0]
    assert len(taking_part) == count
    total = sum(w[i, j] * torch.outer(b[:, i], a[j]) for i, j in taking_part)
    assert torch.allclose(1.5 * total, layer.get_delta_weight("default"), atol=1e-5)


def test_figure_1_the_extra_parameters_are_r_squared():
    layers = nn.ModuleDict({"up": nn.Linear(I, O), "down": nn.Linear(O, I)})
    model = get_peft_model(layers, MosLoraConfig(r=R, target_modules=["up", "down"]))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (I + O + R) * R
