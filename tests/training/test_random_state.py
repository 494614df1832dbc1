"""Random numbers: others on every rank; in a checkpoint the states of this rank's GPU alone, so that a resume may see
fewer GPUs or others."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import set_seed

from llava_moslora.adapters.dropout import draw_seed
from llava_moslora.training.random_state import _encode, random_state, seed_rank, set_random_state
from support.zero_runs import run_successfully, settings


class Gpus:
    """torch.cuda with generators of the CPU, of which ``current`` is this rank's."""

    def __init__(self, count: int, current: int = 0):
        self.generators = [torch.Generator().manual_seed(100 * count + number) for number in range(count)]
        self.current = current

    def install(self, patched) -> None:
        patched.setattr(torch.cuda, "is_available", lambda: bool(self.generators))
        patched.setattr(torch.cuda, "get_rng_state", lambda device="cuda": self.generators[self.current].get_state())
        patched.setattr(
            torch.cuda, "set_rng_state", lambda state, device="cuda": self.generators[self.current].set_state(state)
        )
        patched.setattr(torch.cuda, "get_rng_state_all", lambda: [g.get_state() for g in self.generators])
        patched.setattr(
            torch.cuda,
            "set_rng_state_all",
            lambda states: [self.generators[number].set_state(state) for number, state in enumerate(states)],
        )

    def draw(self, number: int) -> list[float]:
        return torch.rand(3, generator=self.generators[number]).tolist()


def saved(monkeypatch, gpus: Gpus) -> dict:
    with monkeypatch.context() as patched:
        gpus.install(patched)
        return json.loads(json.dumps(random_state()))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_rank_goes_on_where_it_sees_other_gpus(monkeypatch, count):
    """Rank 3 of one host with four GPUs, resumed as the only rank of a host, or beside others."""
    then, now = Gpus(4, current=3), Gpus(count, current=count - 1)
    state = saved(monkeypatch, then)
    others = [g.get_state() for g in now.generators[:-1]]
    now.install(monkeypatch)
    set_random_state(state)
    assert now.draw(count - 1) == then.draw(3)
    assert all(torch.equal(g.get_state(), other) for g, other in zip(now.generators, others, strict=False))


def test_of_an_earlier_versions_list_the_ranks_own_is_taken(monkeypatch, capsys):
    then, now = Gpus(4), Gpus(3, current=2)
    state = saved(monkeypatch, then) | {"cuda": [_encode(g.get_state()) for g in then.generators]}
    monkeypatch.setenv("LOCAL_RANK", "2")
    now.install(monkeypatch)
    set_random_state(state)
    assert now.draw(2) == then.draw(2) and capsys.readouterr().out == ""


def test_a_gpu_that_is_not_in_the_list_is_said(monkeypatch, capsys):
    then, now = Gpus(1), Gpus(2, current=1)
    state = saved(monkeypatch, then) | {"cuda": [_encode(g.get_state()) for g in then.generators]}
    monkeypatch.setenv("LOCAL_RANK", "1")
    now.install(monkeypatch)
    set_random_state(state)
    assert now.draw(1) == Gpus(2).draw(1)
    said = "the checkpoint has random states of 1 GPUs, none of GPU 1: it goes on as seeded\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("cuda", [None, []])  # the second: of an earlier version
def test_without_a_gpu_the_others_are_set(cuda):
    state = json.loads(json.dumps(random_state() | {"cuda": cuda}))
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    set_random_state(state)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())


def masks(seed: int, rank: int | None) -> list[int]:
    """Seeds of a rank's first masks; of rank None as one process alone draws them."""
    set_seed(seed)
    if rank is not None:
        seed_rank(seed, rank)
    return [int(draw_seed(0.5)[1]) for _ in range(3)]


def test_every_rank_draws_its_own_masks():
    drawn = [masks(seed, rank)[0] for seed in (0, 1, 2**32 - 1) for rank in range(8)]
    assert len(set(drawn)) == len(drawn)  # also those of runs with neighbouring seeds
    assert masks(42, 1) == masks(42, 1)
    assert masks(42, 0) == masks(42, None)


@pytest.mark.slow
def test_two_ranks_train_with_masks_of_their_own(warm_server, parts, tmp_path):
    """Rank 0 with those of one process alone; from the same start, as both drew the adapters from the seed."""
    same = {"max_steps": 2, "save_steps": 2, "data_order": "sequential", "lora_dropout": 0.1}
    hooks = [["support.ranks:note_masks", {}]]
    found = []
    for name, world in (("alone", 0), ("two", 2)):
        words = settings(parts, tmp_path / name, **same)
        launch = run_successfully(warm_server, words, tmp_path / f"launch-{name}", world=world, hooks=hooks)
        for rank in range(max(world, 1)):
            lines = launch.printed(rank).splitlines()
            found.append([line for line in lines if line.startswith("mask ")])
    alone, first, second = found
    count = min(map(len, found))
    assert count >= 10 and alone[:count] == first[:count]
    assert not set(first) & set(second)
