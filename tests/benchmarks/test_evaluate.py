"""benchmarks/evaluate.py on random models: the same code, questions counted, answers compared."""

import json
import sys

import pytest

from support.launching import run


@pytest.mark.slow
def test_tiny_models(tmp_path):
    command = [sys.executable, "benchmarks/evaluate.py", "--tiny", "--questions", 20, "--repeats", 1]
    done = run([*command, "--output", tmp_path / "r.json"], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["questions"] == 20 and list(result["sides"]) == ["kit", *(f"ours, batch {n}" for n in (1, 16))]
    assert result["sides"]["ours, batch 1"]["answers_unlike_the_kits"] == 0
    assert all(side["questions_per_s"] > 0 for side in result["sides"].values())
    assert result["targets"][0]["found"] == result["sides"]["ours, batch 16"]["ratio"]


def test_without_the_demo_it_names_what_is_missing(tmp_path):
    done = run([sys.executable, "benchmarks/evaluate.py", "--model", tmp_path / "none"])
    assert done.returncode == 4 and "--model" in done.stderr and "make demo" in done.stderr
    assert "Traceback" not in done.stderr
