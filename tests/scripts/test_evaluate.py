"""Evaluation: what cannot be written is refused before the model is loaded, and no answer is lost."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from llava_moslora.errors import Refusal
from llava_moslora.evaluation import question_file
from llava_moslora.evaluation.output import check_output, new_output, writable
from llava_moslora.evaluation.question_file import VqaExample
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
@pytest.mark.parametrize("place", [".", "questions.json/answers.json"])
def test_what_cannot_be_written_is_refused_before_loading(run, parts, questions, monkeypatch, tmp_path, flag, place):
    monkeypatch.setattr(question_file, "load", loaded)
    with pytest.raises(Refusal, match=rf"C-OUTPUT\] .*:{flag}: (this folder is not writable|not a file)"):
        evaluated(monkeypatch, run, "--questions", questions, "--image_folder", parts.images, flag, tmp_path / place)


@pytest.mark.parametrize(("content", "match"), [
    ("[]", r"no questions; found nothing in it; expected a JSON array of questions, or one per line; fix: \[{\"id\""),
    ("{}", r"no questions; found nothing in it"),
    ('{"questions": []}', r"no questions; found an object with questions; .*fix: "),
    ('["a"]', r"record 0: not a question; found a string; .*fix: "),
    ('[{"id": 1, "image": "0.png", "question": "q", "answer": ["a", "b"]}]',
     r"record 0:answer: not text; found an array.*fix: of several answers \(VQAv2\) choose one"),
    ('[{"image": "0.png", "question": "q", "answer": 3}]', r"found a number; .*fix: write the answer in quotes"),
    ('[{"id": 1, "image": null, "question": "q", "answer": "a"}]',
     r"record 0:image: a question without all of its parts; found id, image \(null\), question, answer; expected"),
    ('[{"image": "0.png"}]', r"record 0:question, answer: a question without all of its parts; found image; "
     r"expected id, image, question, answer; fix: \[{"),
    ('[{"id": 1, "image": "0.png", "conversations": []}]', r"fix: conversations are for --data_path"),
    ('{"question_id": 1, "image": "0.png", "text": "q"}', r":answer: .*found question_id, image, text; .*fix: add the"),
    ('{"image": "0.png", "text": "q", "answer": "a"}\n{"image"', r"line 2 is not JSON; .*one per line; fix: "),
    ("image,question", r"not JSON; .*fix: \[{"),
])  # fmt: skip
def test_questions_of_another_kind(run, parts, questions, monkeypatch, content, match):
    questions.write_text(content)
    monkeypatch.setattr(question_file, "load", loaded)
    with pytest.raises(Refusal, match=match):
        evaluated(monkeypatch, run, "--questions", questions, "--image_folder", parts.images)


def test_questions_one_per_line_and_under_llavas_names(tmp_path):
    rows = [
        {"question_id": 7, "image": "0.png", "text": "q", "answer": "a", "category": "x"},
        {"image": "1.png", "question": "r", "answer": "b"},
        {"id": None, "image": "2.png", "question": None, "text": "s", "answer": "c"},
    ]
    expected = [
        VqaExample("7", "0.png", "q", "a"),
        VqaExample("1", "1.png", "r", "b"),
        VqaExample("2", "2.png", "s", "c"),
    ]
    lines = "\n".join(map(json.dumps, rows))
    for name, content in (("a.json", json.dumps(rows)), ("a.jsonl", lines), ("b.jsonl", f"\ufeff{lines}\r\n\n")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert question_file.read_questions(tmp_path / name) == expected, name
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[1]))
    assert question_file.read_questions(tmp_path / "one.jsonl") == [VqaExample("0", "1.png", "r", "b")]


def test_answers_are_no_results(monkeypatch, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text('{"accuracy": 1.0, "answers": ["yes"]}')
    with pytest.raises(Refusal, match=r"C-PATH\] .*: a file, and results are a folder; .*fix: .*--benchmark"):
        evaluated(monkeypatch, tmp_path / "a", tmp_path / "b", "--compare")


def test_no_other_file_is_written_over(run, parts, questions, monkeypatch, tmp_path):
    """Not the run's, an export's, the question file, an image, or answers of another model or other flags."""
    command = [run, "--questions", questions, "--image_folder", parts.images, "--batch_size", 4]
    answers, probe = tmp_path / "new" / "folder" / "answers.json", tmp_path / "other" / "probe.safetensors"
    evaluated(monkeypatch, *command, "--output", answers, "--probe", probe)
    first = answers.read_bytes()
    evaluated(monkeypatch, *command, "--output", answers, "--probe", probe)  # the same command may
    assert answers.read_bytes() == first

    exported = tmp_path / "export"
    (exported / "probe").mkdir(parents=True)
    (exported / "export.json").write_text('{"format": "hf", "run": "run"}')
    (exported / "MANIFEST.json").write_text('{"files": {"export.json": {}, "probe/probe.py": {}}}')
    link, old, text = tmp_path / "link.json", tmp_path / "old.json", tmp_path / "text.json"
    os.link(questions, link)
    old.write_text('{"accuracy": 1.0, "answers": ["yes"]}')  # nobody knows of which model
    text.write_text("no JSON")
    before = {path: path.read_bytes() for path in [*tmp_path.rglob("*"), *run.rglob("*")] if path.is_file()}
    monkeypatch.setattr(question_file, "load", loaded)
    for place, said in (
        (run / "run.json", "among the files of a run"),
        (run / "curves.html", "among the files of a run"),  # a training writes it
        (run / "checkpoint-2" / "new.json", "among the files of a run"),
        (exported / "export.json", "among the files of an export"),
        (exported / "new.json", "among the files of an export"),
        (exported / "probe" / "probe.py", "among the files of an export"),
        (tmp_path / ("x" * 300), "no file can be written there; found File name too long"),
        (tmp_path / ("x" * 250), "no file can be written there; found File name too long"),  # its lock
        (tmp_path / ("x" * 300) / "new.json", "no file can be written there; found File name too long"),
        (questions, "this command reads that file"),
        (link, "this command reads that file"),
    ):
        for flag in ("--output", "--probe"):
            with pytest.raises(Refusal, match=rf"C-OUTPUT\] .*:{flag}: {said}.*fix: (name|choose)"):
                evaluated(monkeypatch, *command, flag, place)
    with pytest.raises(Refusal, match=r":--output: an answer file of an earlier version, .*; fix: move or delete it"):
        evaluated(monkeypatch, *command, "--output", old)
    for place in (text, probe):
        with pytest.raises(Refusal, match=r":--output: a file is there, and it is no answer file .*fix: choose"):
            evaluated(monkeypatch, *command, "--output", place)
    with pytest.raises(Refusal, match=r":--probe: a file is there, and it is no probe; fix: choose another"):
        evaluated(monkeypatch, *command, "--probe", answers)
    with pytest.raises(Refusal, match=r":--probe: the same file as --output"):
        evaluated(monkeypatch, *command, "--output", tmp_path / "x", "--probe", tmp_path / "x")
    for flags, said in ((["--blank"], "found blank False; expected blank True"), (["--untrained"], "found checkpoint")):
        with pytest.raises(Refusal, match=rf":--output: answers of another evaluation; {said}.*fix: choose another"):
            evaluated(monkeypatch, *command, *flags, "--output", answers)
    assert {path: path.read_bytes() for path in before} == before
    questions.write_text(questions.read_text().replace("is it 6?", "is it 7?"))
    with pytest.raises(Refusal, match=r":--output: answers of another evaluation; found questions "):
        evaluated(monkeypatch, *command, "--output", answers)


def test_a_subfolder_of_a_run_or_an_export_is_the_users(run, tmp_path):
    """As for --benchmark; and a folder of another tool is no export."""
    exported, other = tmp_path / "export", tmp_path / "other"
    for folder, content in ((exported, '{"format": "hf", "run": "run"}'), (other, '{"project": "of another tool"}')):
        (folder / "hf").mkdir(parents=True)
        (folder / "export.json").write_text(content)
    (exported / "MANIFEST.json").write_text("no JSON")
    for place in (run / "results" / "radar.png", exported / "results" / "a.json", other / "a.json", other / "hf" / "a"):
        assert writable(str(place), "--radar") == place and place.parent.is_dir()
        place.touch()
        assert writable(str(place), "--radar") == place


def test_too_long_a_folders_name_is_refused(tmp_path):
    for check in (check_output, new_output):
        with pytest.raises(Refusal, match=r"C-OUTPUT\] .*:--output: this folder is not writable; found File name too"):
            check(str(tmp_path / ("x" * 300)))


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
    assert [results[0][key] == results[1][key] for key in ("accuracy", "answers")] == [True, True]
    logits = [load_file(tmp_path / f"{name}.safetensors")["logits"] for name in ("run", "merged")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_what_is_no_model_is_refused(parts, questions, monkeypatch, tmp_path):
    with pytest.raises(Refusal, match=r"C-PATH\] .*neither a run nor a model"):
        evaluated(monkeypatch, tmp_path, "--questions", questions, "--image_folder", parts.images)
