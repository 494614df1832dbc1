"""Two commands at once in one folder, as processes: one wins, the other says so in one line."""

import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from llava_moslora.data.cache import find_damage
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.export.export import export
from llava_moslora.files.manifest import MANIFEST, read_facts, verify_manifest
from llava_moslora.inference.load import load_run
from llava_moslora.runs.checkpoints import checkpoints, lock_run, prune, publish_checkpoint, step_of
from scripts import evaluate, evaluate_commonsense, prepare_data
from support.commonsense import write_sets
from support.export_runs import trained_run
from support.golden_cases import tiny_files
from support.training_runs import train

pytestmark = pytest.mark.faults
CONTEXT = multiprocessing.get_context("fork")  # with everything imported: the two begin at the same moment


@pytest.fixture
def run(parts, tmp_path):
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    return tmp_path / "run"


def _told(command, results) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        command()
        results.put("done")
    except Refusal as refusal:
        results.put(refusal.line())
    except BaseException as error:
        results.put(f"traceback: {error!r}")


def at_once(*commands) -> list[str]:
    """How each of them ended, in alphabetical order."""
    results = CONTEXT.Queue()
    children = [CONTEXT.Process(target=_told, args=(command, results)) for command in commands]
    for child in children:
        child.start()
    ends = [results.get(timeout=120) for _ in children]
    for child in children:
        child.join()
    return sorted(ends)


def test_two_exports_into_one_folder(run, tmp_path):
    out = tmp_path / "out"
    for overwrite in [False] + [True] * 5:
        first, second = at_once(*[partial(export, run, out, prove=False, overwrite=overwrite)] * 2)
        assert first == "done" and (second.startswith(("error[C-LOCKED]", "error[C-OUTPUT]")) or overwrite), second
        assert second == "done" or second.startswith("error[C-"), second
        assert verify_manifest(out) and sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_two_locks_of_one_run(tmp_path):
    def train() -> None:
        lock = lock_run(tmp_path / "new", patience=0)
        time.sleep(2)
        lock.release()

    for _ in range(5):
        first, second = at_once(train, train)
        assert first == "done" and second.startswith("error[C-LOCKED]"), second


def test_two_trainings_into_one_folder(parts, tmp_path):
    """The second waits for the lock for some seconds, as a killed run's processes hold it so long."""
    command = partial(train, parts, tmp_path / "run", max_steps=2, save_steps=1, report_to="none")
    first, second = at_once(command, command)
    assert first == "done" and second.startswith(("error[C-LOCKED]", "error[C-OUTPUT]")), second
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-1"]
    assert all(verify_manifest(path) for path in checkpoints(tmp_path / "run"))


def _script(main: Callable[[], None], *words: object) -> Callable[[], None]:
    def command() -> None:
        sys.argv = ["script.py", *map(str, words)]
        main()

    return command


def test_two_prepares_into_one_folder(parts, tmp_path):
    """The second waits, and finds what the first has made."""
    words = ["--model_name_or_path", parts.llm, "--vision_tower", parts.clip, "--data_path", parts.data]
    words += ["--image_folder", parts.images, "--data_cache", tmp_path / "cache", "--report_dir", tmp_path / "report"]
    command = _script(prepare_data.main, *words)
    for _ in range(3):
        assert at_once(command, command) == ["done", "done"]
        assert {p.name for p in (tmp_path / "report").iterdir()} == {".lock", "report.html", "report.json"}
        (cache,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
        assert find_damage(cache) is None
        shutil.rmtree(tmp_path / "cache")


def test_two_evaluations_into_one_folder(run, tmp_path):
    name = "mmbench_en"
    file = BENCHMARKS[name].file
    (tmp_path / f"{file}.tsv").write_text(tiny_files(random.Random(0))[file][0], encoding="utf-8")
    words = [run, "--benchmark", name, "--data", tmp_path, "--output"]
    command = _script(evaluate.main, *words, tmp_path / "out")
    first, second = at_once(command, command)
    assert first == "done" and (second == "done" or second.startswith("error[C-LOCKED]")), second
    assert at_once(_script(evaluate.main, *words, tmp_path / "alone")) == ["done"]
    for file in ("results.json", f"{name}/answers-0.jsonl"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes(), file


def test_two_evaluations_of_a_question_file(run, parts, tmp_path):
    questions = [{"id": n, "image": f"{n}.png", "question": "what colour?", "answer": "red"} for n in (0, 1, 3)]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    words = [run, "--questions", tmp_path / "questions.json", "--image_folder", parts.images, "--output"]
    command = _script(evaluate.main, *words, tmp_path / "out.json", "--probe", tmp_path / "probe.safetensors")
    first, second = at_once(command, command)
    assert first == "done" and (second == "done" or second.startswith("error[C-LOCKED]")), second
    assert len(json.loads((tmp_path / "out.json").read_text())["answers"]) == 3
    left = {"out.json", "probe.safetensors", "questions.json", "run"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_two_evaluations_of_commonsense(parts, tmp_path):
    """The lock is taken before anything of the harness is used."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("needs lm_eval")
    data = write_sets(tmp_path / "sets", 2)
    words = [parts.llm, "--data", data, "--sets", "boolq", "--output", tmp_path / "out"]
    command = _script(evaluate_commonsense.main, *words)
    first, second = at_once(command, command)
    assert first == "done" and (second == "done" or second.startswith("error[C-LOCKED]")), second
    assert json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_run_is_read_while_its_training_saves_and_prunes(run, tmp_path):
    """Far more often than any training does: a checkpoint lives about as long as it takes to load it."""
    ended = CONTEXT.Event()
    load_run(run)  # imports what it needs
    begun = time.monotonic()
    load_run(run)
    pause = max(0.2, (time.monotonic() - begun) / 2)  # on a slow machine both are slow

    def train() -> None:
        while not ended.wait(pause):
            newest = checkpoints(run)[0]
            facts = {name: read_facts(newest)[name] for name in ("llm", "vision_tower", "data")}
            step = step_of(newest) + 1
            publish_checkpoint(
                run / f"checkpoint-{step}",
                partial(_copy, newest),
                lambda: facts | {"step": step},  # noqa: B023
            )
            prune(run, 2)

    def read() -> None:
        try:
            for number in range(5):
                export(run, tmp_path / str(number), prove=False)
                verify_manifest(tmp_path / str(number))
                load_run(run)
        finally:
            ended.set()

    assert at_once(train, read) == ["done", "done"]
    assert step_of(checkpoints(run)[0]) > 5


def _copy(checkpoint: Path, staging: Path) -> None:
    shutil.copytree(checkpoint, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
