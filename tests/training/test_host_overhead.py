"""Walks over all modules that are spared at every step, and what they must still do."""

from types import SimpleNamespace

import torch
from torch import nn

from llava_moslora.training.host_overhead import clear_trained_gradients, switch_mode_once


def engine_of(model):
    return SimpleNamespace(module=model, train=model.train)


def test_the_mode_is_switched_where_it_changes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    engine, visits = engine_of(model), []
    switch_mode_once(engine)
    inner = model[1].train
    model[1].train = lambda mode=True: visits.append(mode) or inner(mode)
    engine.train()
    assert visits == [True]  # what the model says of itself need not be true of its parts
    engine.train()
    assert visits == [True]
    model.eval()  # questions are answered in between
    engine.train()
    assert visits == [True, False, True] and model[1].training
    engine.train(False)
    assert visits == [True, False, True, False] and not model[1].training


def test_parts_that_were_loaded_in_eval_mode_train():
    """A part's loader leaves it in eval mode; the model that is put together of parts says that it trains."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval())
    assert model.training
    engine = engine_of(model)
    switch_mode_once(engine)
    engine.train()
    assert model[1].training


def test_gradients_of_what_is_trained_are_cleared():
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    engine = SimpleNamespace(module=model)
    clear_trained_gradients(engine, dict(model.named_parameters()))
    assert model.weight.grad is not None
    engine.zero_grad()
    assert model.weight.grad is None and model.bias.grad is None
