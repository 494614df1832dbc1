"""VLMEvalKit's own run of our model class asks what this package asks: the same text, ids and images."""

import json
import os
import random
import subprocess
import sysconfig
from pathlib import Path

import pytest

from llava_moslora.evaluation.ask import Questions
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.inference.load import load
from support.export_runs import trained_run
from support.golden_cases import tiny_files
from support.kit import kit_python
from support.recorder import Recorder

HERE = Path(__file__).parent
LIMIT, TOKENS = 25, 3


@pytest.mark.slow
def test_the_kits_own_run_asks_the_same(parts, tmp_path):
    """Multiple choice in English and Chinese, yes or no, short answers, MathVista and MM-Vet."""
    python = kit_python()
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    benchmarks = [benchmark for benchmark in BENCHMARKS.values() if benchmark.name != "ai2d"]
    for name, (text, _) in tiny_files(random.Random(8)).items():
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    names = [benchmark.file for benchmark in benchmarks]
    packages = sysconfig.get_path("purelib")
    command = [python, HERE / "ask_in_kit.py", tmp_path / "run", packages, LIMIT, tmp_path / "seen.json", *names]
    settings = {"LMUData": str(tmp_path), "PRED_FORMAT": "tsv", "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}"}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())

    recorder = Recorder()
    chat_model = recorder.watch(load(tmp_path / "run"))
    texts = set()
    for benchmark in benchmarks:
        table = open_benchmark(benchmark, tmp_path)
        asked = Questions.of(benchmark, table, prompts="prompts", batch_size=1)
        assert len(seen[benchmark.file]) == min(LIMIT, len(table))
        recorder.rows.clear()
        for number in asked.numbers[:LIMIT]:
            list(recorder.answer(chat_model, [asked.image_and_prompt(number)], max_new_tokens=TOKENS))
        ours = {row["index"]: found for row, found in zip(asked.rows[:LIMIT], recorder.rows, strict=True)}
        for index, found in ours.items():
            assert seen[benchmark.file][index] == found, (benchmark.name, index)
            assert found["images"] == 1
        assert list(seen[benchmark.file]) == list(ours)
        texts |= {found["text"] for found in ours.values()}
    assert len(texts) > 100 and any("请直接回答选项字母" in text for text in texts)
