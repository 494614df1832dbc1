"""GPUs by name; how torch's allocator is set for a training, before CUDA starts."""

import os
import subprocess
import sys

import pytest

from llava_moslora.devices import ALLOCATOR, known_name, use_expandable_segments
from support.launching import ROOT


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "name, known",
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA L40S", "L40S"), ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA A10G", "A10G"), ("NVIDIA GH200 480GB", "GH200"), ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA RTX A1000", None), ("NVIDIA RTX A4000", None), ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA L400", None), ("AMD Instinct MI250X", "MI250X"), ("NVIDIA GB200", "GB200"),
        ("NVIDIA H100L 94GB", "H100L"), ("Tesla V100S-PCIE-32GB", "V100S"), ("NVIDIA A100X", "A100X"),
    ],
)  # fmt: skip
def test_names_that_drivers_give(name, known):
    assert known_name(name) == known


def test_segments_may_grow():
    use_expandable_segments()
    assert os.environ.pop(ALLOCATOR[0]) == "expandable_segments:True" and ALLOCATOR[1] not in os.environ


@pytest.mark.parametrize("name", ALLOCATOR)
def test_the_environments_setting_stays(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    use_expandable_segments()
    assert {n: os.environ.get(n) for n in ALLOCATOR} == dict.fromkeys(ALLOCATOR) | {name: "max_split_size_mb:64"}


@pytest.mark.parametrize("script", ["train_vit_llm.py", "train_sdxl.py"])
def test_trainings_set_it_before_torch_is_there(script):
    """torch is replaced by a module whose import says what it finds."""
    code = f"""
import os, runpy, sys
from importlib.abc import MetaPathFinder

class Torch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.exit(f"torch finds {{os.environ.get('{ALLOCATOR[0]}')}}")

sys.meta_path.insert(0, Torch())
sys.argv = ["{script}", *{ARGUMENTS[script]!r}]
runpy.run_path("scripts/{script}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "torch finds expandable_segments:True" in done.stderr, done.stderr[-1500:]


ARGUMENTS = {
    "train_vit_llm.py": ["--model_name_or_path", "scripts", "--data_path", "x", "--output_dir", "x"],
    "train_sdxl.py": ["--model_name_or_path", "x", "--image_folder", "x", "--prompt", "x", "--output_dir", "x"],
}
