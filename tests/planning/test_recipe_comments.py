"""Every training recipe says what the planner says of it. ``python -m support.recipe_plans`` writes the comments."""

import os
import re

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.planning.recipe import read_recipe
from support.launching import ROOT
from support.recipe_plans import comment, in_recipe, recipes, write_configs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    write_configs(folder)
    return folder


FIRST = ("llama3_8b_moslora.sh", "llama3_8b_qmoslora_24gb.sh", "llama3_8b_commonsense.sh")  # the others are slow


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in recipes()]
)
def test_the_comment_is_the_plan(folder, recipe, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(ROOT)
    said = comment(recipe, folder)
    assert in_recipe(recipe) == said, "python -m support.recipe_plans writes it again"
    assert max(map(len, said.splitlines())) <= 160
    assert ("; --recompute auto: " in said) == (not re.search("24gb|commonsense", recipe))


@pytest.fixture
def hosts(folder, monkeypatch):
    """``hosts(hostfile content, **environment)``: GPUs of the recipe for two hosts."""

    def gpus(content: str, given=None, **environment):
        (folder / "own").write_text(content)
        for name, value in ({"HOSTFILE": folder / "own", "MASTER": "127.0.0.1"} | environment).items():
            monkeypatch.setenv(name, str(value))
        return read_recipe(ROOT / "scripts" / "llama3_8b_moslora_two_hosts.sh", given).gpus

    return gpus


def test_all_gpus_of_all_hosts_count(hosts):
    assert hosts("node-a slots=4\n# node-x slots=9\n\nnode-b  slots = 3  # new\n") == 7
    assert hosts("", LAUNCHER="torchrun", RANK_OF_HOST=0) == 8
    assert hosts("", LAUNCHER="slurm", SLURM_NNODES=3) == 12


def test_hosts_that_nobody_names_are_asked_for(hosts):
    with pytest.raises(Refusal, match=r"C-RECIPE.*the number of GPUs is not known.*--gpus"):
        hosts("", LAUNCHER="slurm")
    assert hosts("", given=6, LAUNCHER="slurm") is None
    with pytest.raises(Refusal, match=r"C-RECIPE.*the number of GPUs is not known"):
        hosts("node-a\n")
