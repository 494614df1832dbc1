"""A disk that fills up under the other scripts: the commonsense sets, VLMEvalKit's scores, plans, studies, subjects."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llava_moslora.evaluation import human_kit
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.subject_images import read_drawn
from llava_moslora.evaluation.subjects import read_subjects
from support import studies
from support.commonsense import write_sets
from support.full_disk import STEP, Command, every, none_wrong
from support.golden_cases import tiny_files
from support.launching import ROOT
from support.planned import plan_words
from support.subjects import write_clip_model, write_drawn, write_subjects

pytestmark = pytest.mark.faults


def answer_without_the_harness() -> None:
    """A hook: lm-evaluation-harness writes nothing into the output, and is not needed to see what is written there."""
    from scripts import evaluate_commonsense

    samples = [{"index": n, "prompt": "?", "said": "true", "read": "true", "answer": "true"} for n in range(3)]
    evaluate_commonsense.harness = lambda: None
    evaluate_commonsense.language_model = lambda *_: None
    evaluate_commonsense.ask = lambda *_: samples


def test_commonsense(disk, parts, tmp_path):
    data = write_sets(tmp_path / "sets", 3)
    words = [parts.llm, "--data", data, "--sets", "boolq", "piqa", "--output", disk.disk / "there" / "out"]
    hooks = [["faults.test_disk_others:answer_without_the_harness", {}]]
    command = Command("scripts.evaluate_commonsense:main", words, hooks=hooks)
    none_wrong(disk.fail_everywhere(command, every(max(1, STEP // 9))))


def test_the_kits_files(disk, run, tmp_path):
    """The kit itself is a stand-in; its process writes to the same disk."""
    file = BENCHMARKS["mmbench_en"].file
    text = tiny_files(random.Random(0))[file][0]
    (tmp_path / f"{file}.tsv").write_text(text, encoding="utf-8")
    kit = tmp_path / "python"
    tables = {"kit": "ms-vlmeval 0.0.20", "pandas": "3", "tables": {file: [{"split": "dev", "Overall": 0.5}]}}
    kit.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"if len(sys.argv) == 2:\n    print(json.dumps({{'kit': 'ms-vlmeval 0.0.20'}}))\n    sys.exit()\n"
        "for name in json.load(open(sys.argv[2])):\n"
        "    os.makedirs(name)\n    with open(name + '/predictions', 'w') as stream:\n        stream.write('A')\n"
        f"with open(sys.argv[3], 'w') as stream:\n    stream.write({json.dumps(tables)!r})\n"
    )
    kit.chmod(0o755)
    words = [run, "--benchmark", "mmbench_en", "--data", tmp_path, "--batch_size", "4", "--scorer", "vlmevalkit"]
    words += ["--kit_python", kit, "--output", disk.disk / "out"]
    command = Command("scripts.evaluate:main", words)
    none_wrong(disk.fail_everywhere(command, lambda count: range(count // 2, count, max(1, STEP // 4))))


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "JSON"])
def test_planning(disk, parts, tmp_path, more):
    none_wrong(
        disk.fail_everywhere(Command("scripts.plan:main", plan_words(parts, "--html", disk.disk / "plan.html", *more)))
    )


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "JSON"])
def test_a_plan_for_a_full_disk(parts, more):
    """Its exit status says whether the training fits: a plan that nobody can read must not say so."""
    command = [sys.executable, ROOT / "scripts" / "plan.py", *plan_words(parts, *more)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert done.returncode == 4 and done.stderr.splitlines()[-1].startswith("error[E-DISK] "), done.stderr
    assert "Traceback" not in done.stderr


def train_by_a_stub(*, folder: str) -> None:
    """A hook: trainings without torch, whose own files are left alone; and no wait for them."""
    import os

    from llava_moslora.studies import processes

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(folder)
    undisturbed = ("env", "-u", "FULL_DISK", "-u", "LD_PRELOAD", sys.executable)
    processes.TRAINING = (*undisturbed, studies.__file__)
    processes.POLL = 0.01


def test_a_study(disk, tmp_path):
    file = studies.write_study(tmp_path)
    hooks = [["faults.test_disk_others:train_by_a_stub", {"folder": str(tmp_path)}]]
    free = ["done.json", "log.txt"]  # how long it took, and that it was begun twice
    command = Command("scripts.study:main", [file, "--output_dir", disk.disk / "study"], free=free, hooks=hooks)
    none_wrong(disk.fail_everywhere(command, every(max(1, STEP // 3))))


def test_subjects(disk, tmp_path):
    """Scores of two methods, the kit for people, and the count of what they say."""
    data = write_subjects(tmp_path / "subjects")
    drawn = [write_drawn(tmp_path / name, data, fade=fade) for name, fade in (("a", 0.1), ("b", 0.6))]
    words = ["score", *drawn, "--subjects", data, "--clip", write_clip_model(tmp_path / "clip")]
    words += ["--output", disk.disk / "there" / "out"]
    main = "scripts.evaluate_subjects:main"
    none_wrong(disk.fail_everywhere(Command(main, words), every(max(1, STEP // 9))))
    words = ["kit", *drawn, "--subjects", data, "--output", disk.disk / "there" / "kit", "--pairs", "1"]
    none_wrong(disk.fail_everywhere(Command(main, words), every(max(1, STEP // 9))))
    words = ["count", *answered_kit(tmp_path / "kit", data, drawn), "--output", disk.disk / "there" / "counted"]
    none_wrong(disk.fail_everywhere(Command(main, words), every(max(1, STEP // 9))))


def answered_kit(folder: Path, data: Path, drawn: list[Path]) -> list[Path]:
    """A kit's key, and what one person says to it."""
    a, b = map(read_drawn, drawn)
    folder.mkdir()
    human_kit.write_kit(folder, a, b, read_subjects(data, ()), per_subject=1, seed=0)
    key = folder / human_kit.KEY
    content = json.loads(key.read_text())
    said = {str(n): dict.fromkeys(human_kit.QUESTIONS, "left") for n in range(1, len(content["pairs"]) + 1)}
    answers = folder / "answers.json"
    answers.write_text(json.dumps({"kit": content["kit"], "person": "ada", "answers": said}))
    return [key, answers]
