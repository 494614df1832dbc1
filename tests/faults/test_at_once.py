"""Two commands at once in one folder, as processes: one wins, the other says so in one line."""

import multiprocessing
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.export.export import export
from llava_moslora.files.manifest import MANIFEST, read_facts, verify_manifest
from llava_moslora.inference.load import load_run
from llava_moslora.runs.checkpoints import checkpoints, lock_run, prune, publish_checkpoint, step_of
from support.export_runs import trained_run

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


def test_two_trainings_into_one_folder(tmp_path):
    def train() -> None:
        lock = lock_run(tmp_path / "new", patience=0)
        time.sleep(2)
        lock.release()

    for _ in range(5):
        first, second = at_once(train, train)
        assert first == "done" and second.startswith("error[C-LOCKED]"), second


def test_a_run_is_read_while_its_training_saves_and_prunes(run, tmp_path):
    """Far more often than any training does: its checkpoint is gone in most attempts to read one."""
    ended = CONTEXT.Event()

    def train() -> None:
        while not ended.wait(0.2):
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
