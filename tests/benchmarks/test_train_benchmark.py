"""The training benchmark: its code with tiny parts on a CPU, and itself where there is a GPU."""

import json
import sys

import pytest
import torch
from launching import run


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses():
    done = run([sys.executable, "benchmarks/train.py"])
    assert done.returncode == 4 and "needs a GPU" in done.stderr and "--tiny" in done.stderr


@pytest.mark.slow
def test_tiny_parts_on_a_cpu(tmp_path):
    sizes = ["--tiny", "--steps", 2, "--batch", 2]
    done = run(
        [sys.executable, "benchmarks/train.py", *sizes, "--output", tmp_path / "r.json"], CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert set(result["figures"]) == {"moslora", "qmoslora", "lora"} and result["tiny"]
    assert all(row["tokens_per_second"] > 0 for row in result["figures"].values())


@pytest.mark.gpu
def test_real_shapes_on_a_gpu():
    done = run([sys.executable, "benchmarks/train.py"])
    assert done.returncode == 0, done.stderr
    for method in ("moslora", "qmoslora", "lora"):
        assert method in done.stdout
