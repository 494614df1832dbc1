"""The eight commonsense sets: prompts and scores of LLM-Adapters, with and without lm-evaluation-harness."""

import json
import re
import sys

import jinja2
import pytest

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.commonsense import SetScore, find_files, score, table, task_config
from llava_moslora.evaluation.commonsense_sets import PAPER, SETS
from support.commonsense import ANSWERS, FOLDERS, REFERENCE_PROMPT, extract_answer, records, write_sets

needs_harness = pytest.mark.skipif("not __import__('importlib').util.find_spec('lm_eval')", reason="needs lm_eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("dataset"))


def replies(options: list[str], row: dict) -> list[str]:
    wrong = next(option for option in options if option != row["answer"])
    return [text.replace("RIGHT", row["answer"]).replace("WRONG", wrong) for text in ANSWERS]


@pytest.mark.parametrize("name", SETS)
def test_prompts_are_the_references_byte_for_byte(name):
    """Rendered as the harness does."""
    environment = jinja2.Environment(keep_trailing_newline=True)
    row = records(FOLDERS[name][1])[0]
    prompt = environment.from_string(task_config(name, "test.json")["doc_to_text"]).render(**row)
    assert prompt.encode() == REFERENCE_PROMPT.format(instruction=row["instruction"]).encode()


@pytest.mark.parametrize("name", SETS)
def test_answers_are_read_by_the_references_rules(name):
    task = task_config(name, "test.json")
    (filters,) = task["filter_list"]
    pattern = filters["filter"][0]["regex_pattern"]
    options = FOLDERS[name][1]
    assert set(re.findall(r"[a-z]+\d?", pattern)) >= set(options)
    for row in records(options):
        for text in replies(options, row):
            found = re.findall(pattern, text)
            assert (found[0] if found else "") == extract_answer(name, text)
    how = {"num_beams": 4, "do_sample": False, "max_gen_toks": 32, "until": []}
    assert task["generation_kwargs"] == how and task["task"] == f"llm_adapters_{name}" and "include" not in task


def test_the_table_stands_next_to_the_papers_row():
    scores = {name: SetScore(right=9, unread=1, asked=10) for name in SETS}
    lines = table(scores, "moslora").splitlines()
    assert [line.split()[0] for line in lines[1:9]] == "ARC-e OBQA SIQA ARC-c WinoG. PIQA BoolQ HellaS.".split()
    assert lines[1].split() == ["ARC-e", "90.0", "59.6", "to", "98.2", "10.0", "%", "10", "90.5"]
    assert lines[9].split() == ["mean", "90.0", "85.6"]
    assert "mean" not in table({"boolq": scores["boolq"]}, "lora")
    assert table(scores, "flora").splitlines()[9].split() == ["mean", "90.0", "84.2"]  # its eight make 84.26
    assert [row[8:] for row in PAPER.values()] == [(x,) for x in (82.8, 80.9, 85.2, 84.2, 81.4, 85.0, 85.2, 85.6)]
    assert [sum(row[:8]) / 8 for row in PAPER.values()] == pytest.approx([row[8] for row in PAPER.values()], abs=0.07)


def test_files_are_checked_before_a_model_is_loaded(data, tmp_path):
    assert list(find_files(data, ["boolq", "arc_easy"])) == ["boolq", "arc_easy"]
    with pytest.raises(Refusal, match=r"D-FILE.*ARC-Easy/test.json.*LLM-Adapters' folder dataset/"):
        find_files(tmp_path, ["arc_easy"])
    (tmp_path / "boolq").mkdir()
    for content, code in (("{}", "D-PARSE"), ("[", "D-PARSE"), ('[{"instruction": "a"}]', "D-SCHEMA")):
        (tmp_path / "boolq" / "test.json").write_text(content)
        with pytest.raises(Refusal, match=code):
            find_files(tmp_path, ["boolq"])


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("name", SETS)
def test_the_harness_asks_and_scores_as_the_reference(name, tmp_path):
    """A model that says what it is told: the prompts it gets, and the scores of a scripted list of answers."""
    from lm_eval.api.model import LM

    from llava_moslora.evaluation.commonsense import ask

    folder, options = FOLDERS[name]
    row = records(options)[0]
    said = replies(options, row)
    file = tmp_path / folder / "test.json"
    file.parent.mkdir()
    rows = [row | {"instruction": f"{row['instruction']} {number}"} for number in range(len(said))]
    file.write_text(json.dumps(rows))
    prompts = []

    class Scripted(LM):
        def generate_until(self, requests):
            prompts.extend(request.args[0] for request in requests)
            return list(said)

        loglikelihood = loglikelihood_rolling = None

    samples = ask(Scripted(), name, file)
    assert prompts == [REFERENCE_PROMPT.format(instruction=row["instruction"]) for row in rows]
    expected = [extract_answer(name, text) for text in said]
    assert [s["read"] for s in samples] == expected and [s["said"] for s in samples] == said
    found = score(samples)
    assert found == SetScore(expected.count(row["answer"]), expected.count(""), len(said)) and 0 < found.right < 9
    assert len(json.dumps(samples)) > 100


@pytest.mark.slow
@needs_harness
def test_a_run_is_asked_offline_and_continued(parts, data, tmp_path, monkeypatch, capsys):
    """The script on a tiny run; batches do not change answers, and nothing is asked twice."""
    from scripts import evaluate_commonsense
    from support.text_runs import text_flags, write_alpaca
    from support.training_runs import train

    alpaca = write_alpaca(tmp_path / "alpaca.json")
    train(parts, tmp_path / "run", **text_flags(parts, alpaca, max_steps=20, save_steps=20, learning_rate=3e-2))

    def start(output: str, *flags: str) -> dict:
        argv = ["evaluate_commonsense.py", tmp_path / "run", "--data", data, "--output", tmp_path / output, *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        evaluate_commonsense.main()
        return json.loads((tmp_path / output / "results.json").read_text())

    one = start("one", "--sets", "boolq", "piqa")
    assert "ARC-e" not in capsys.readouterr().out and one["boolq"]["asked"] == 5
    three = start("three", "--sets", "boolq", "piqa", "--batch_size", "3")
    answers = [
        [[s["said"] for s in json.loads((tmp_path / out / f"{name}.json").read_text())["samples"]] for name in one]
        for out in ("one", "three")
    ]
    assert answers[0] == answers[1] and one == three
    monkeypatch.setattr(evaluate_commonsense, "load", None)
    assert start("one", "--sets", "boolq", "piqa") == start("one", "--sets", "piqa") == one  # all that is there
    with pytest.raises(Refusal, match="C-ANSWERS"):
        start("one", "--sets", "boolq", "--batch_size", "2")
