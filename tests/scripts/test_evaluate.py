"""Evaluation: what cannot be written is refused before the model is loaded, and no answer is lost."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from llava_moslora.errors import Refusal
from llava_moslora.evaluation import question_file
from llava_moslora.export.export import export
from scripts import evaluate
from support.export_runs import trained_run


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    trained_run(folder, parts.llm, parts.clip, parts.projector)
    return folder


@pytest.fixture
def questions(tmp_path):
    rows = [{"id": k, "image": "0.png", "question": f"is it {k}?", "answer": "yes"} for k in range(7)]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(rows))
    return file


def evaluated(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()


def loaded(*_, **__):
    raise AssertionError("the model was loaded")


def test_a_folder_is_no_question_file(tmp_path):
    with pytest.raises(Refusal, match=r"D-PATH\] .*--questions: a folder, not a file; expected a JSON file"):
        question_file.read_questions(tmp_path)
    with pytest.raises(Refusal, match=r"D-PATH\] .*nope.json:--questions: no such file"):
        question_file.read_questions(tmp_path / "nope.json")


@pytest.mark.parametrize("flag", ["--output", "--probe"])
@pytest.mark.parametrize("place", ["missing/answers.json", ".", "questions.json/answers.json"])
def test_what_cannot_be_written_is_refused_before_loading(run, parts, questions, monkeypatch, tmp_path, flag, place):
    monkeypatch.setattr(question_file, "load", loaded)
    with pytest.raises(Refusal, match=rf"C-OUTPUT\] .*:{flag}: (this folder is not writable|not a file)"):
        evaluated(monkeypatch, run, "--questions", questions, "--image_folder", parts.images, flag, tmp_path / place)


@pytest.mark.parametrize(("content", "match"), [
    ("[]", r"no questions; found an empty array"),
    ("{}", r"no questions; found dict"),
    ('["a"]', r"record 0: not a question; found str"),
    ('[{"id": 1, "image": "0.png", "question": "q", "answer": ["a", "b"]}]', r"record 0:answer: not text; found list"),
    ('[{"id": 1, "image": null, "question": "q", "answer": "a"}]', r"record 0:image: not text; found NoneType"),
])  # fmt: skip
def test_questions_of_another_kind(run, parts, questions, monkeypatch, content, match):
    questions.write_text(content)
    monkeypatch.setattr(question_file, "load", loaded)
    with pytest.raises(Refusal, match=match):
        evaluated(monkeypatch, run, "--questions", questions, "--image_folder", parts.images)


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size(run, parts, questions, monkeypatch, size):
    monkeypatch.setattr(question_file, "load", loaded)
    with pytest.raises(Refusal, match=r"C-FLAG\] --batch_size: out of range"):
        evaluated(monkeypatch, run, "--questions", questions, "--image_folder", parts.images, "--batch_size", size)


def test_answers_are_kept_and_gone_on_with(run, parts, questions, monkeypatch, tmp_path, capsys):
    """Stopped after 5 of 7 in batches of 2: four answers are reused, three questions are asked."""
    command = [run, "--questions", questions, "--image_folder", parts.images, "--batch_size", 2]
    evaluated(monkeypatch, *command, "--output", tmp_path / "whole.json", "--probe", tmp_path / "probe.safetensors")
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert len(whole["answers"]) == 7 and load_file(tmp_path / "probe.safetensors")["logits"].shape[0] == 7
    ask, asked = question_file.ask, []

    def stopped(chat_model, questions, *, batch_size):
        for number, text in enumerate(ask(chat_model, questions, batch_size=batch_size)):
            if number == 5:
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(question_file, "ask", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluated(monkeypatch, *command, "--output", tmp_path / "answers.json")
    assert not (tmp_path / "answers.json").exists()
    with pytest.raises(Refusal, match=r"answers\.json\.unfinished:--output: unfinished answers of another evaluation"):
        evaluated(monkeypatch, *command, "--blank", "--output", tmp_path / "answers.json")

    def counted(chat_model, questions, *, batch_size):
        asked.append(len(questions))
        return ask(chat_model, questions, batch_size=batch_size)

    monkeypatch.setattr(question_file, "ask", counted)
    evaluated(monkeypatch, *command, "--output", tmp_path / "answers.json")
    assert asked == [3] and "continuing after 4 answers" in capsys.readouterr().out
    assert json.loads((tmp_path / "answers.json").read_text()) == whole
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_export_answers_as_its_run(run, parts, questions, monkeypatch, tmp_path):
    merged = export(run, tmp_path / "merged", ["hf"])["hf"]
    results = []
    for model, name in ((run, "run"), (merged, "merged")):
        output = tmp_path / f"{name}.json"
        evaluated(
            monkeypatch, model, "--questions", questions, "--image_folder", parts.images, "--output", output,
            "--probe", tmp_path / f"{name}.safetensors",
        )  # fmt: skip
        results.append(json.loads(output.read_text()))
    assert results[0] == results[1]
    logits = [load_file(tmp_path / f"{name}.safetensors")["logits"] for name in ("run", "merged")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_what_is_no_model_is_refused(parts, questions, monkeypatch, tmp_path):
    with pytest.raises(Refusal, match=r"C-PATH\] .*neither a run nor a model"):
        evaluated(monkeypatch, tmp_path, "--questions", questions, "--image_folder", parts.images)
