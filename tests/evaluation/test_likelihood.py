"""The commonsense sets by lm-evaluation-harness's own likelihood tasks, over local files."""

import json
import sys
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.commonsense_sets import SETS
from llava_moslora.evaluation.likelihood import (
    STOCK,
    LikelihoodScore,
    ask_likelihood,
    find_stock_files,
    likelihood_json,
    likelihood_table,
    score_likelihood,
)

needs_harness = pytest.mark.skipif("not __import__('importlib').util.find_spec('lm_eval')", reason="needs lm_eval")
CHOICES = {"text": ["the sky", "grass", "a very long answer", "red"], "label": ["A", "B", "C", "D"]}
# Set → a record as on the Hub, what the harness asks of it (context, continuation), and the right option's number
RECORDS = {
    "arc_easy": (
        {"id": "1", "question": "What is green?", "choices": CHOICES, "answerKey": "B"},
        [("Question: What is green?\nAnswer:", f" {text}") for text in CHOICES["text"]],
        1,
    ),
    "openbookqa": (
        {"id": "1", "question_stem": "Red is", "choices": CHOICES, "answerKey": "D"},
        [("Red is", f" {text}") for text in CHOICES["text"]],
        3,
    ),
    "social_i_qa": (
        {"context": "He fell.", "question": "Why?", "answerA": "ice", "answerB": "fun", "answerC": "go", "label": "3"},
        [("Q: He fell. Why?\nA:", f" {text}") for text in ("ice", "fun", "go")],
        2,
    ),
    "winogrande": (
        {"sentence": "The cup fell off the _ again.", "option1": "table", "option2": "sky", "answer": "1"},
        [("The cup fell off the table", " again."), ("The cup fell off the sky", " again.")],
        0,
    ),
    "piqa": (
        {"goal": "To boil water", "sol1": "heat it", "sol2": "freeze it", "label": 0},
        [("Question: To boil water\nAnswer:", " heat it"), ("Question: To boil water\nAnswer:", " freeze it")],
        0,
    ),
    "boolq": (
        {"question": "is it red", "passage": "It is.", "idx": 0, "label": 1},
        [("It is.\nQuestion: is it red?\nAnswer:", " no"), ("It is.\nQuestion: is it red?\nAnswer:", " yes")],
        1,
    ),
    "hellaswag": (
        {"activity_label": "Tea", "ctx_a": "A man", "ctx_b": "he", "endings": ["a", "b", "c", "d"], "label": "2"},
        [("Tea: A man He", f" {ending}") for ending in "abcd"],
        2,
    ),
}
RECORDS["arc_challenge"] = RECORDS["arc_easy"]


def write(folder: Path, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    for name, (record, *_) in RECORDS.items():
        (folder / f"{STOCK[name].name}.jsonl").write_text(f"{json.dumps(record)}\n" * count)
    return folder


def test_files_are_checked_before_a_model_is_loaded(tmp_path):
    data = write(tmp_path / "data")
    assert list(find_stock_files(data, list(SETS))) == list(SETS)
    with pytest.raises(Refusal, match=r"D-FILE.*social_iqa.jsonl.*store the validation split there"):
        find_stock_files(tmp_path, ["social_i_qa"])
    for content, message in (
        ("", "D-PARSE.*no records"),
        ("{", "D-PARSE.*not JSON"),
        ("[]", "D-PARSE.*not an object"),
        ('{"goal": "a", "sol1": "b", "sol2": "c", "label": "1"}', "D-SCHEMA.*label.*not a record of piqa"),
        ('{"goal": "a", "sol1": "b", "label": 1}', "D-SCHEMA.*sol2.*not a record of piqa"),
    ):
        (data / "piqa.jsonl").write_text(content)
        with pytest.raises(Refusal, match=message):
            find_stock_files(data, ["piqa"])


def test_the_table_has_both_scores_and_their_intervals():
    scores = {name: LikelihoodScore(9, None if name == "boolq" else 8, 10) for name in SETS}
    lines = likelihood_table(scores).splitlines()
    assert lines[1].split() == ["ARC-e", "90.0", "59.6", "to", "98.2", "80.0", "49.0", "to", "94.3", "10"]
    assert lines[7].split() == ["BoolQ", "90.0", "59.6", "to", "98.2", "-", "10"]
    assert lines[9].split() == ["mean", "90.0"]
    assert likelihood_json(scores)["boolq"] == {"asked": 10, "acc": 90.0}
    assert likelihood_json(scores)["piqa"] == {"asked": 10, "acc": 90.0, "acc_norm": 80.0}


def test_a_row_of_the_paper_has_no_place_here(monkeypatch):
    from scripts.evaluate_commonsense import parse

    with pytest.raises(Refusal, match=r"C-FLAG.*--paper: has no effect"):
        parse(["run", "--data", "d", "--output", "o", "--tasks", "likelihood", "--paper", "lora"])


@pytest.mark.slow
@needs_harness
@pytest.mark.parametrize("name", SETS)
def test_the_harness_asks_its_own_task(name, tmp_path):
    """A model that is told its likelihoods: the right option, another one, one that is likelier per character."""
    from lm_eval.api.model import LM

    data = write(tmp_path / "data")
    _, asked, right = RECORDS[name]
    seen = []
    wrong = (right + 1) % len(asked)
    told = [[-9.0] * len(asked) for _ in range(3)]
    told[0][right] = told[1][wrong] = -1.0
    told[2] = [-float(len(continuation)) for _, continuation in asked]

    class Told(LM):
        def loglikelihood(self, requests):
            seen.extend(request.args for request in requests)
            return [(value, False) for row in told for value in row]

        generate_until = loglikelihood_rolling = None

    samples = ask_likelihood(Told(), name, find_stock_files(data, [name])[name])
    assert seen == asked * 3
    assert [sample["likelihood"] for sample in samples] == told
    assert [sample["asked"] for sample in samples] == [[list(pair) for pair in asked]] * 3
    assert [sample["acc"] for sample in samples][:2] == [1, 0]
    best = max(range(len(asked)), key=lambda option: told[2][option])
    assert samples[2]["acc"] == (best == right)
    found = score_likelihood(samples)
    assert found.asked == 3 and (found.acc_norm is None) == (name in ("boolq", "social_i_qa", "winogrande"))
    assert json.loads(json.dumps(samples)) == samples


@pytest.mark.slow
@needs_harness
def test_a_run_is_asked_offline_and_continued(parts, tmp_path, monkeypatch, capsys):
    from scripts import evaluate_commonsense
    from support.text_runs import text_flags, write_alpaca
    from support.training_runs import train

    alpaca = write_alpaca(tmp_path / "alpaca.json")
    train(parts, tmp_path / "run", **text_flags(parts, alpaca, max_steps=2, save_steps=2))
    data = write(tmp_path / "data")

    def start(*flags: str) -> dict:
        argv = ["evaluate_commonsense.py", tmp_path / "run", "--data", data, "--output", tmp_path / "out"]
        argv += ["--tasks", "likelihood", "--sets", *flags]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        evaluate_commonsense.main()
        return json.loads((tmp_path / "out" / "likelihood.json").read_text())

    first = start("piqa")
    both = start("piqa", "boolq")
    assert both["piqa"] == first["piqa"] and both["boolq"]["asked"] == 3
    assert "acc_norm" in capsys.readouterr().out and not (tmp_path / "out" / "results.json").exists()
    samples = json.loads((tmp_path / "out" / "likelihood_piqa.json").read_text())["samples"]
    assert all(value < 0 for sample in samples for value in sample["likelihood"])
    monkeypatch.setattr(evaluate_commonsense, "load", None)
    assert start("boolq") == both
    with pytest.raises(Refusal, match="C-ANSWERS"):
        start("boolq", "--batch_size", "2")
