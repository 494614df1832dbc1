"""Every file of questions that could not be scored is refused before a model is loaded: file, row and column named."""

import logging
import random
from dataclasses import replace

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import ABILITIES, BENCHMARKS, PAPER, Benchmark
from llava_moslora.evaluation.checks import ROW_CHECKS, check, open_benchmark
from llava_moslora.evaluation.prompts import prompt
from llava_moslora.evaluation.reading import RULES
from llava_moslora.evaluation.scoring import KINDS, score
from llava_moslora.evaluation.tsv import Table
from support.golden_cases import SUBTASKS, image, tiny_files, tsv

FILES = tiny_files(random.Random(0))
CHOICE = {"index": "1", "image": image(1), "question": "q?", "A": "red", "B": "blue", "C": "", "answer": "B"}
MATH = CHOICE | {
    "question_type": "multi_choice", "answer_type": "text", "choices": "['1', '2']", "answer_option": "A", "task": "t",
    "answer": "1", "skills": "['s']",
}  # fmt: skip
NUMBER = MATH | {"question_type": "free_form", "answer_type": "integer", "choices": "", "answer_option": ""}
SHORT = {"index": "1", "image": image(1), "question": "q?", "answer": "['a', 'b']"}
MME = [
    {"index": f"{n}{a}", "image": image(n), "question": "q?", "answer": a, "category": task, "image_path": f"{n}.png"}
    for n, task in enumerate(SUBTASKS)
    for a in ("Yes", "No")
]
GROUP = [
    CHOICE | {"index": "5", "C": "green"},
    CHOICE | {"index": "1000005", "C": "red", "A": "blue", "B": "green", "answer": "A", "image": "5"},
    CHOICE | {"index": "2000005", "C": "blue", "A": "green", "B": "red", "answer": "C", "image": "5"},
]


def opened(folder, name, rows, **arguments):
    columns = list(rows[0])
    (folder / f"{BENCHMARKS[name].file}.tsv").write_text(tsv(columns, rows), encoding="utf-8")
    return open_benchmark(BENCHMARKS[name], folder, **arguments)


@pytest.mark.parametrize(
    "name, rows",
    [("seed", [CHOICE, CHOICE | {"index": "2", "C": "None", "answer": "C"}]), ("textvqa", [SHORT]),
     ("mathvista", [MATH, NUMBER | {"index": "2"}]), ("mmvet", [SHORT | {"category": "rec"}]), ("mme", MME),
     ("mmbench_en", GROUP)],
)  # fmt: skip
def test_what_can_be_scored_is_read(tmp_path, name, rows):
    assert len(opened(tmp_path, name, rows)) == len(rows)


@pytest.mark.parametrize(
    "name, rows, code, record, key",
    [
        ("seed", [CHOICE, CHOICE | {"index": "2", "answer": "C"}], "D-ANSWER", 1, "answer"),
        ("seed", [CHOICE | {"answer": "b"}], "D-ANSWER", 0, "answer"),
        ("seed", [CHOICE | {"answer": "blue"}], "D-ANSWER", 0, "answer"),
        ("seed", [CHOICE | {"answer": ""}], "D-SCHEMA", 0, "answer"),
        ("seed", [CHOICE | {"B": "", "answer": "A"}], "D-SCHEMA", 0, "B"),
        ("seed", [CHOICE | {"question": ""}], "D-SCHEMA", 0, "question"),
        ("seed", [{k: v for k, v in CHOICE.items() if k != "answer"}], "D-SCHEMA", None, "answer"),
        ("ai2d", [{k: v for k, v in CHOICE.items() if k != "B"}], "D-SCHEMA", None, "B"),
        ("textvqa", [SHORT | {"answer": "yes"}], "D-ANSWER", 0, "answer"),
        ("textvqa", [SHORT | {"answer": "['yes']"}], "D-ANSWER", 0, "answer"),
        ("textvqa", [SHORT | {"answer": "['yes', 3]"}], "D-ANSWER", 0, "answer"),
        ("textvqa", [SHORT | {"answer": "[" * 500}], "D-ANSWER", 0, "answer"),
        ("mathvista", [MATH | {"question_type": "essay"}], "D-SCHEMA", 0, "question_type"),
        ("mathvista", [NUMBER | {"answer_type": "complex"}], "D-SCHEMA", 0, "answer_type"),
        ("mathvista", [NUMBER | {"answer": ""}], "D-ANSWER", 0, "answer"),
        ("mathvista", [MATH | {"task": ""}], "D-SCHEMA", 0, "task"),
        ("mathvista", [MATH | {"choices": "1, 2"}], "D-SCHEMA", 0, "choices"),
        ("mathvista", [MATH | {"choices": ""}], "D-SCHEMA", 0, "choices"),
        ("mathvista", [MATH | {"answer_option": "C"}], "D-ANSWER", 0, "answer_option"),
        ("mathvista", [MATH | {"answer_option": ""}], "D-ANSWER", 0, "answer_option"),
        ("mmvet", [SHORT | {"category": ""}], "D-SCHEMA", 0, "category"),
        ("mme", [*MME[:-1], MME[-1] | {"answer": "no"}], "D-ANSWER", 27, "answer"),
        ("mme", [MME[0] | {"category": "colour"}, *MME[1:]], "D-SCHEMA", 0, "category"),
        ("mme", MME[:-1], "D-SCHEMA", 26, "image_path"),
        ("mme", [*MME, MME[0] | {"index": "x"}], "D-SCHEMA", 28, "image_path"),
        ("mme", MME[2:], "D-SCHEMA", None, "category"),
        ("mmbench_en", GROUP[:2], "D-INDEX", 0, "index"),
        ("mmbench_cn", [*GROUP, GROUP[1] | {"index": "1000006"}], "D-INDEX", 3, "index"),
        ("mmbench_cn", [*GROUP, GROUP[1] | {"index": "7.0"}], "D-INDEX", 3, "index"),
        ("mmbench_cn", [*GROUP, GROUP[1] | {"index": "-7"}], "D-INDEX", 3, "index"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(tmp_path, name, rows, code, record, key):
    with pytest.raises(Refusal) as refused:
        opened(tmp_path, name, rows)
    refusal = refused.value
    assert (refusal.code, refusal.record, refusal.key) == (code, record, key)
    assert refusal.file == tmp_path / f"{BENCHMARKS[name].file}.tsv"


def test_missing_files_and_rotations_and_named_groups(tmp_path):
    with pytest.raises(Refusal, match=r"MME\.tsv.*nothing is downloaded"):
        open_benchmark(BENCHMARKS["mme"], tmp_path)
    assert len(opened(tmp_path, "mmbench_en", GROUP[:2], allow_missing_rotations=True)) == 2
    rows = [row | {"index": str(n), "g_index": "7", "image": GROUP[0]["image"]} for n, row in enumerate(GROUP, 7)]
    assert len(opened(tmp_path, "mmbench_en", rows)) == 3
    with pytest.raises(Refusal, match="a rotation without its question"):
        opened(tmp_path, "mmbench_en", [row | {"g_index": "70"} for row in rows])


def test_answers_from_the_file_beside_it(tmp_path):
    without = [{k: v for k, v in row.items() if k != "answer"} for row in GROUP]
    (tmp_path / "MMBench.tsv").write_text(tsv(list(CHOICE), [*GROUP, CHOICE | {"index": "9"}]), encoding="utf-8")
    found = opened(tmp_path, "mmbench_en", without)
    assert [row["answer"] for row in found.rows] == ["B", "A", "C"] and "answer" in found.columns
    (tmp_path / "MMBench.tsv").write_text(tsv(list(CHOICE), GROUP[:2]), encoding="utf-8")
    with pytest.raises(Refusal) as refused:
        opened(tmp_path, "mmbench_en", without)
    assert (refused.value.code, refused.value.record, refused.value.key) == ("D-ANSWER", 2, "answer")


def test_another_md5_and_hidden_options_are_warnings(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    found = opened(tmp_path, "seed", [CHOICE, CHOICE | {"index": "2", "B": "None"}])
    assert "is not VLMEvalKit's file: md5 " + found.md5 in caplog.text
    assert "some text of 1 rows" in caplog.text and "The first is index 2" in caplog.text
    caplog.clear()
    open_benchmark(replace(BENCHMARKS["seed"], md5=found.md5), tmp_path)
    assert "VLMEvalKit names" not in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_a_file_is_a_refusal(tmp_path, name):
    """Fields exchanged, emptied and overwritten at random: nothing but a refusal is raised, and it names the file."""
    benchmark = next(b for b in BENCHMARKS.values() if b.file == name)
    random_, lines = random.Random(name), FILES[name][0]
    words = lines.replace("\n", "\t\n\t").split("\t")
    for _ in range(60):
        damaged = words.copy()
        for _ in range(random_.choice((1, 2, 4))):
            place = random_.randrange(len(damaged))
            if damaged[place] != "\n":
                damaged[place] = random_.choice(
                    ("", "A", "Z", "1", "None", "[", "['a']", "1000001", random_.choice(words))
                )
        path = tmp_path / f"{name}.tsv"
        path.write_bytes("\t".join(damaged).replace("\t\n\t", "\n").encode())
        try:
            table = Table(path)
            check(table, benchmark)
            answers = {row["index"]: row["answer"] for row in table.rows}
            score(benchmark.kind, table.rows, answers, RULES["rules"], answers)  # what is not refused can be scored
        except Refusal as refusal:
            assert str(path) in refusal.line()


def test_a_new_benchmark_is_one_row(tmp_path, monkeypatch):
    row = Benchmark("toy", "Toy", "TOY", "multiple-choice", 2, "0" * 32, ("A", "B", "answer"), 5)
    monkeypatch.setitem(BENCHMARKS, "toy", row)
    table = opened(tmp_path, "toy", [CHOICE, CHOICE | {"index": "2", "answer": "A"}])
    assert prompt(table.rows[0], row.kind, "prompts-2024").startswith("q?\nA. red\nB. blue\n")
    outcomes = score(row.kind, table.rows, {"1": "B", "2": "B"}, RULES["rules"]).outcomes
    assert [outcome.right for outcome in outcomes] == [1.0, 0.0]
    with pytest.raises(Refusal, match=r"\[D-ANSWER\] .*TOY\.tsv"):
        opened(tmp_path, "toy", [CHOICE | {"answer": "C"}])


def test_the_table_of_benchmarks():
    assert len(BENCHMARKS) == 9 and {b.kind for b in BENCHMARKS.values()} == set(KINDS) == set(ROW_CHECKS)
    assert len({b.md5 for b in BENCHMARKS.values()}) == 9 and all(len(b.md5) == 32 for b in BENCHMARKS.values())
    for model, row in PAPER.items():  # Table 5 prints averages of unrounded numbers
        mean = sum(row[name] for name in BENCHMARKS) / 9
        assert mean == pytest.approx(row["average"], abs=0.11), model
    best = PAPER["InternLM2", "QMoSLoRA", "kaiming"]
    assert (best["mmbench_en"], best["mme"], best["average"]) == (73.8, 64.1, 59.5)
    assert len(ABILITIES) == 6
