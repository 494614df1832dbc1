"""Readings, scores and prompts against the golden file that the real VLMEvalKit made (see ``make_golden.py``)."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import check
from llava_moslora.evaluation.prompts import prompt
from llava_moslora.evaluation.reading import (
    RULES,
    mathvista_right,
    normalise,
    read_mathvista,
    read_option,
    read_yes_no,
    vqa_accuracy,
)
from llava_moslora.evaluation.scoring import score
from llava_moslora.evaluation.tsv import Table
from support.golden_cases import unpacked
from support.kit import kit_python

HERE = Path(__file__).parent
KINDS = {benchmark.file: benchmark for benchmark in BENCHMARKS.values()}
ABBREVIATIONS = {
    "attribute_reasoning": "AR", "coarse_perception": "CP", "finegrained_perception (cross-instance)": "FP-C",
    "finegrained_perception (instance-level)": "FP-S", "logic_reasoning": "LR", "relation_reasoning": "RR",
}  # fmt: skip
BOTH = pytest.mark.parametrize("place, rules", [(0, RULES["rules"]), (1, RULES["rules-2024"])], ids=list(RULES))


@pytest.fixture(scope="module")
def golden():
    return json.loads((HERE / "golden/vlmevalkit.json").read_text(encoding="utf-8"))


def test_it_is_large_enough_and_names_its_makers(golden):
    assert golden["made_with"]["ms-vlmeval"] == "0.0.20" and RULES["rules"].source.startswith("ms-vlmeval 0.0.20 ")
    assert golden["commit_2024"].startswith("ab638e4a") and "ab638e4a" in RULES["rules-2024"].source
    assert len(golden["options"]) >= 500 and len(golden["vqa"]) >= 300 and len(golden["yes_no"]) >= 200
    assert set(golden["files"]) == set(KINDS) - {"AI2D_TEST"}
    # Cases that tell the two sets of rules apart; no reading of yes or no does.
    assert sum(case[2] != case[3] for case in golden["options"]) >= 50
    assert sum(case[2] != case[3] for case in golden["vqa"]) >= 5


@BOTH
def test_options(golden, place, rules):
    wrong = [
        (options, answer)
        for options, answer, *letters in golden["options"]
        if read_option(unpacked(answer), options, rules).value != letters[place]
    ]
    assert wrong == []


@BOTH
def test_yes_and_no(golden, place, rules):
    for answer, *values in golden["yes_no"]:
        assert (read_yes_no(unpacked(answer), rules).value or "Unknown") == values[place], answer


@BOTH
def test_short_answers(golden, place, rules):
    for text, *expected in golden["normalised"]:
        assert normalise(text, rules) == expected[place]
    for truths, prediction, *expected in golden["vqa"]:
        assert vqa_accuracy(prediction, truths, rules) == pytest.approx(expected[place], abs=1e-12), (
            truths,
            prediction,
        )


@BOTH
def test_mathvista(golden, place, rules):
    for row, prediction, *expected in golden["mathvista"]:
        read, right = expected[place]
        assert read_mathvista(row, prediction, rules).value == read, (row, prediction)
        assert mathvista_right(row, prediction, rules) == right, (row, prediction)


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"AI2D_TEST"}))
def test_whole_files(golden, tmp_path, name):
    compare_file(name, golden["files"][name], tmp_path)


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"AI2D_TEST"}))
def test_prompts(golden, tmp_path, name):
    compare_prompts(name, golden["files"][name], tmp_path)


def compare_file(name, golden_file, folder):
    """Our score of a whole file against every figure of the kit's table."""
    table, kind = table_of(name, golden_file, folder), KINDS[name].kind
    answers = golden_file["predictions"]
    judged = answers if kind == "mmvet" else None

    def ours(rows):
        return score(kind, rows, answers, RULES["rules"], judged)

    if kind == "mathvista":
        result = ours(table.rows)
        expected = {line["Task&Skill"]: line["acc"] for line in golden_file["table"]}
        found = {"Overall": result.value} | result.by["task"] | result.by["skill"]
        prefetched = golden_file["table"][0]["prefetch"]
        assert sum(outcome.read is not None for outcome in result.outcomes) == prefetched
    elif kind == "mmvet":
        result = ours(table.rows)
        expected = {line["Category"]: line["acc"] for line in golden_file["table"]}
        found = {"Overall": result.value} | result.by["capability"]
    elif kind == "yes-no":
        result, (expected,) = ours(table.rows), golden_file["table"]
        found = result.by["subtask"] | {"perception": result.by["total"]["perception"]}
        found["reasoning"] = result.by["total"]["cognition"]
        assert result.value == pytest.approx((expected["perception"] + expected["reasoning"]) / 28)
    elif kind == "vqa":
        (expected,), found = golden_file["table"], {"Overall": ours(table.rows).value}
    else:
        compare_splits(golden_file["table"], table.rows, ours)
        return
    assert found == pytest.approx(expected, abs=1e-9)


def compare_splits(lines, rows, ours):
    """Multiple choice: the kit has a line for every split, with shares of 1."""
    for line in lines:
        of_split = [row for row in rows if row.get("split", "none") == line["split"]]
        result = ours(of_split)
        by = result.by.get("l2-category", {}) | result.by["category"]
        found = {"Overall": result.value} | {ABBREVIATIONS.get(name, name): value for name, value in by.items()}
        expected = {name: 100 * value for name, value in line.items() if name != "split" and value is not None}
        assert found == pytest.approx(expected, abs=1e-9)


def compare_prompts(name, golden_file, folder):
    table = table_of(name, golden_file, folder)
    assert len(table) == len(golden_file["prompts"])
    for row in table.rows:
        expected = golden_file["prompts"][row["index"]]
        kind = KINDS[name].kind
        assert prompt(row, kind, "prompts") == expected[0]
        assert prompt(row, kind, "prompts-2024") == expected[-1]


def table_of(name, golden_file, folder):
    path = folder / f"{name}.tsv"
    path.write_bytes(golden_file["tsv"].encode("utf-8"))
    table = Table(path)
    check(table, KINDS[name])
    return table


def made_by_the_kit(folder, *, seed):
    """A golden file of now. The part of 2024 is in it where the environment names a clone."""
    command = [kit_python(), str(HERE / "make_golden.py"), "--output", str(folder / "golden.json"), "--seed", str(seed)]
    if clone := os.environ.get("LLAVA_MOSLORA_TEST_KIT_CLONE"):
        command += ["--repository", clone]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(HERE.parent)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "golden.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_golden_file_is_what_the_kit_writes(golden, tmp_path):
    fresh = made_by_the_kit(tmp_path, seed=golden["seed"])
    assert fresh["made_with"]["ms-vlmeval"] == golden["made_with"]["ms-vlmeval"]
    if fresh["commit_2024"] is None:
        golden = without_2024(golden)
        fresh = without_2024(fresh)
    assert fresh | {"made_with": None} == golden | {"made_with": None}


def without_2024(golden):
    """The cases and files with what the kit of now reads and asks alone."""
    length = {"options": 3, "yes_no": 2, "normalised": 2, "vqa": 3, "mathvista": 3}
    files = {
        name: file | {"prompts": {index: texts[:1] for index, texts in file["prompts"].items()}}
        for name, file in golden["files"].items()
    }
    cases = {name: [case[:columns] for case in golden[name]] for name, columns in length.items()}
    return golden | cases | {"files": files, "commit_2024": None}


@pytest.mark.slow
def test_new_cases_through_the_kit(tmp_path):
    fresh, rules = made_by_the_kit(tmp_path, seed=4711), RULES["rules"]
    for check_one in (test_options, test_yes_and_no, test_short_answers, test_mathvista):
        check_one(fresh, 0, rules)
    for name, golden_file in fresh["files"].items():
        compare_file(name, golden_file, tmp_path)
        for row in table_of(name, golden_file, tmp_path).rows:
            assert prompt(row, KINDS[name].kind, "prompts") == golden_file["prompts"][row["index"]][0]
