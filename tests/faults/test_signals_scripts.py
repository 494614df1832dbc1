"""SIGINT, SIGTERM and SIGHUP at any operation of every script: one line, no traceback; and the command that was stopped
last, started again, ends well.

``STOPS`` is how many operations of each command are tried with each signal; the default is 2.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import stops
from support.commonsense import write_sets
from support.export_runs import internlm2
from support.golden_cases import tiny_files
from support.launching import ROOT, free_port
from support.planned import plan_words
from support.studies import write_study
from support.subjects import write_clip_model, write_drawn, write_subjects

pytestmark = pytest.mark.faults
STOPS = int(os.environ.get("STOPS", "2"))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAID = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
# Of each script words that its flags accept; what they name does not exist, which is found after the imports.
WORDS = {
    "chat": "nowhere",
    "convert_adapter": "nowhere --output_dir nowhere/out --format lora",
    "convert_internlm2": "nowhere --output_dir nowhere/out",
    "evaluate": "nowhere --benchmark mme --data nowhere --output nowhere/out",
    "evaluate_commonsense": "nowhere --data nowhere --output nowhere/out",
    "evaluate_subjects": "score nowhere --subjects nowhere --clip nowhere --output nowhere/out",
    "export": "nowhere --output_dir nowhere/out",
    "plan": "--model_name_or_path nowhere --gpu rtx4090 --tokens 64 --records 100",
    "prepare_data": "--model_name_or_path nowhere --data_path nowhere",
    "serve": "nowhere",
    "study": "nowhere --output_dir nowhere/out",
    "train_sdxl": "--model_name_or_path nowhere --image_folder nowhere --prompt x --output_dir nowhere/out",
    "train_vit_llm": "--model_name_or_path nowhere --data_path nowhere --output_dir nowhere/out",
}


def one_line(status: int, printed: str, said: str) -> None:
    """The command ended as a stopped one does."""
    lines = [line for line in printed.splitlines() if line.startswith("error[")]
    assert status == 75 and "Traceback" not in printed, f"status {status}\n{printed[-3000:]}"
    assert lines == [f"error[P-STOPPED] stopped by {said}; fix: start the same command again"], printed[-3000:]


@pytest.mark.parametrize("script", WORDS)
def test_while_it_begins(tmp_path, script):
    """At the first imports, and within those of the libraries."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    for number, name in zip((0, 100, 700), SIGNALS, strict=True):
        command = [sys.executable, "-m", "support.stops", tmp_path / "state", str(number), str(int(name))]
        command += [ROOT / "scripts" / f"{script}.py", *WORDS[script].split()]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
        assert not stops.handled_late(tmp_path / "state")
        came = stops.counted(tmp_path / "state")[1]
        assert came or number > 100, "the script has no so many operations"
        if came:
            one_line(done.returncode, done.stdout + done.stderr, SAID[name])
            assert done.stderr.count("\n") == 1 and not done.stdout
        else:
            assert done.returncode in (2, 3), done.stderr


# ---- while it works ----


def type_two_questions() -> None:
    """A hook."""
    import io

    sys.stdin = io.StringIO("what is this?\nand this?\n")


def come_to_serve(*, port: int, name: int = signal.SIGTERM) -> None:
    """A hook: as soon as the page is there, the server gets a signal."""
    import threading
    import time
    import urllib.request

    owner = os.getpid()

    def visit() -> None:
        while True:
            time.sleep(0.2)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30).read()
                break
            except OSError:
                continue
        os.kill(owner, name)

    threading.Thread(target=visit, daemon=True).start()


def commands(run: Path, parts, folder: Path) -> dict[str, tuple]:
    """Name → script, its arguments, and hooks; each writes to ``out``."""
    questions = [{"id": n, "image": f"{n}.png", "question": "what colour?", "answer": "red"} for n in (0, 1, 3)]
    (folder / "questions.json").write_text(json.dumps(questions))
    for name, (text, _) in tiny_files(random.Random(0)).items():
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")
    data = write_subjects(folder / "subjects")
    drawn = [write_drawn(folder / name, data, fade=fade) for name, fade in (("a", 0.1), ("b", 0.6))]
    out, output = folder / "out", ["--output", folder / "out"]
    base = ["--model_name_or_path", parts.llm, "--vision_tower", parts.clip, "--data_path", parts.data]
    base += ["--image_folder", parts.images]
    port = free_port()
    return {
        "chat": ("chat", [run], ["faults.test_signals_scripts:type_two_questions", {}]),
        "serve": ("serve", [run, "--port", port], ["faults.test_signals_scripts:come_to_serve", {"port": port}]),
        "evaluate a question file": (
            "evaluate", [run, "--questions", folder / "questions.json", "--image_folder", parts.images, *output]
        ),
        "evaluate a benchmark": ("evaluate", [run, "--benchmark", "mmbench_en", "--data", folder, *output]),
        "evaluate_commonsense": (
            "evaluate_commonsense",
            [parts.llm, "--data", write_sets(folder / "sets", 3), "--sets", "boolq", *output],
            ["faults.test_disk_others:answer_without_the_harness", {}],
        ),
        "evaluate_subjects score": (
            "evaluate_subjects",
            ["score", *drawn, "--subjects", data, "--clip", write_clip_model(folder / "clip"), *output],
        ),
        "evaluate_subjects kit": (
            "evaluate_subjects", ["kit", *drawn, "--subjects", data, "--pairs", "1", *output]
        ),
        "plan": ("plan", plan_words(parts, "--html", out)),
        "study": (
            "study", [write_study(folder), "--output_dir", out],
            ["faults.test_disk_others:train_by_a_stub", {"folder": str(folder)}],
        ),
        "export": ("export", [run, "--output_dir", out, "--no_proof"]),
        "prepare_data": ("prepare_data", [*base, "--data_cache", out, "--report_dir", out / "report"]),
        "convert_internlm2": ("convert_internlm2", [internlm2(folder / "internlm2"), "--output_dir", out]),
    }  # fmt: skip


NAMES = ["chat", "serve", "evaluate a question file", "evaluate a benchmark", "evaluate_commonsense",
         "evaluate_subjects score", "evaluate_subjects kit", "plan", "study", "export", "prepare_data",
         "convert_internlm2"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_while_it_works(server, run, parts, tmp_path, name):
    if name == "serve" and importlib.util.find_spec("gradio") is None:
        pytest.skip("needs gradio")
    (script, words, *hooks), state = commands(run, parts, tmp_path)[name], tmp_path / "state"
    chance = random.Random(name)

    def launch(number: int = -1, kind: int = 0):
        first = ["support.stops:at", {"state": str(state), "number": number, "name": int(kind)}]
        output = tmp_path / f"launch{len(list(tmp_path.glob('launch*')))}"
        return server.launch(words, output, main=f"scripts.{script}:main", hooks=[first, *hooks], limit=120)

    whole = launch()
    assert whole.succeeded, whole.printed()[-3000:]
    operations, _ = stops.counted(state)
    for kind in SIGNALS:
        for number in sorted(chance.sample(range(operations), min(STOPS, operations))):
            out = tmp_path / "out"
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
            stopped = launch(number, kind)
            came = stops.counted(state)[1]
            where = f"signal {kind.name} at operation {number} of {operations}: status {stopped.status}"
            print(where, stopped.printed().splitlines()[-1:])
            assert not stopped.stuck, where + stopped.printed()[-3000:]
            if stopped.succeeded:
                assert "Traceback" not in stopped.printed(), where + stopped.printed()[-3000:]
                # Ctrl-C means an answer of a chat, a page that is served is ended by a signal, and done work is done
                meant = script == "serve" or (script, kind) == ("chat", signal.SIGINT)
                assert meant or number > operations - 20 or not came, where
                continue
            assert came, where + stopped.printed()[-3000:]
            lines = [line for line in stopped.printed().splitlines() if line.startswith("error[")]
            assert "Traceback" not in stopped.printed(), where + stopped.printed()[-3000:]
            assert stopped.status == [75], where + stopped.printed()[-3000:]
            assert len(lines) == 1 and lines[0].startswith("error[P-STOPPED] "), where + stopped.printed()[-3000:]
    if stopped.succeeded or script in ("export", "convert_internlm2"):  # or stopped after the folder had its name
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    again = launch()
    assert again.succeeded, again.printed()[-3000:]


@pytest.mark.parametrize("kind", SIGNALS)
def test_a_page_that_is_served(server, run, tmp_path, kind):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs gradio")
    port = free_port()
    hooks = [["support.stops:at", {"state": str(tmp_path / "state"), "number": -1, "name": 0}]]
    hooks += [["faults.test_signals_scripts:come_to_serve", {"port": port, "name": int(kind)}]]
    served = server.launch(
        [run, "--port", port], tmp_path / "launch", main="scripts.serve:main", hooks=hooks, limit=120
    )
    printed = served.printed()
    assert served.succeeded and printed.splitlines()[-1] == "stopped", printed[-3000:]
    assert "Traceback" not in printed and "error[" not in printed, printed[-3000:]
