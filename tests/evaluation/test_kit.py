"""The same answers scored by VLMEvalKit: by a stand-in with the real kit's tables (of the golden file), and in the slow
tier by the real one."""

import json
import os
import random
import sys
from pathlib import Path

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.kit import Kit, find_kit, score_by_kit
from support.golden_cases import image, tiny_files, tsv
from support.kit import HEADER, answered, kit_python

GOLDEN = json.loads((Path(__file__).parent / "golden/vlmevalkit.json").read_text(encoding="utf-8"))["files"]
NAMES = [name for name, benchmark in BENCHMARKS.items() if benchmark.file in GOLDEN]
SCORED = [name for name in NAMES if name not in ("mathvista", "mmvet")]
# Predictions that a table of the kit's usual formats would change, and one that is long.
ODD = [
    "None",
    "",
    "NA",
    "word " * 8000 + "B",
    "=1+1",
    "nan",
    "null",
    "A\tB",
    "A\r\nB",
    '"B"',
    "yes",
    " ",
    "不",
    "\x00B",
]


def stand_in(folder, kit="ms-vlmeval 0.0.20", work="", tables=None):
    """A program that is called as the kit's Python is: says its version, and does ``work`` instead of scoring."""
    content = {"kit": kit, "pandas": "3", "tables": {n: f["table"] for n, f in GOLDEN.items()} | (tables or {})}
    (folder / "tables.json").write_text(json.dumps(content))
    program = folder / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, shutil, sys\n"
        f"if len(sys.argv) == 2:\n    print({json.dumps(json.dumps({'kit': kit}))})\n    sys.exit()\n"
        f"job = json.load(open(sys.argv[2]))\n{work}\n"
        "for name in job:\n    os.makedirs(name)\n    open(name + '/predictions', 'w').close()\n"
        f"shutil.copy({str(folder / 'tables.json')!r}, sys.argv[3])\n"
    )
    program.chmod(0o755)
    return str(program)


def answers_of(folder, names, **settings):
    return [
        answered(folder / "out", folder / "data", name, GOLDEN[file]["tsv"], GOLDEN[file]["predictions"], **settings)
        for name, file in ((name, BENCHMARKS[name].file) for name in names)
    ]


def lines_of(text):
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}


def test_the_same_figures_as_the_kits_tables(tmp_path):
    """Every figure of the real kit's tables, under its name; what needs a judge is said to."""
    text = score_by_kit(find_kit(stand_in(tmp_path)), tmp_path / "out", answers_of(tmp_path, NAMES), HEADER)
    lines = lines_of(text)
    assert [title for title, line in lines.items() if "the same" in line] == [
        "MMBench EN (dev)", "MMBench EN (test)", "MMBench CN (dev)", "MMBench CN (test)", "SEED-Bench image", "SciQA",
        "TextVQA", "MME",
    ]  # fmt: skip
    for title in ("MathVista", "MM-Vet"):
        assert "needs a judge" in lines[title]
    (seed,) = GOLDEN["SEEDBench_IMG"]["table"]
    assert lines["SEED-Bench image"].count(f"{100 * seed['Overall']:.2f}") == 2
    assert "VLMEvalKit (ms-vlmeval 0.0.20)" in text and "This is not the VLMEvalKit version" not in text
    assert (tmp_path / "out/results.md").read_text() == f"# the run\n\n{text}"
    for name in SCORED:
        kept = json.loads((tmp_path / "out" / name / "vlmevalkit.json").read_text())
        assert kept["kit"] == "ms-vlmeval 0.0.20" and kept["table"] == GOLDEN[BENCHMARKS[name].file]["table"]
        assert kept["rules"] == "rules" and kept["different"] == []
        assert kept["figures"]["kit"] == pytest.approx(kept["figures"]["ours"]) and len(kept["figures"]["ours"]) > 0
        assert (tmp_path / "out" / name / "vlmevalkit" / "predictions").is_file()
    assert len(json.loads((tmp_path / "out/mme/vlmevalkit.json").read_text())["figures"]["ours"]) == 14 + 3
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".vlmevalkit")]


def test_a_difference_is_named(tmp_path):
    (line,) = GOLDEN["SEEDBench_IMG"]["table"]
    changed = {name: value for name, value in line.items() if name != "category 0"}
    changed |= {"category 1": line["category 1"] + 0.01, "category 9": 1.0}
    kit = find_kit(stand_in(tmp_path, "ms-vlmeval 0.0.21", tables={"SEEDBench_IMG": [changed]}))
    asked = answers_of(tmp_path, ["seed"])
    for _ in range(2):  # what an earlier command left is replaced
        text = score_by_kit(kit, tmp_path / "out", asked, HEADER)
        ours = {name: f"{100 * value:.2f}" for name, value in line.items() if name != "split"}
        assert "3 of 5 figures differ" in lines_of(text)["SEED-Bench image"]
        assert f"category 1 {100 * line['category 1'] + 1:.2f} there, {ours['category 1']} here" in text
        assert f"category 0 – there, {ours['category 0']} here" in text and "category 9 100.00 there, – here" in text
        assert "This is not the VLMEvalKit version" in text


def test_only_what_needs_a_judge(tmp_path):
    """Nothing is started."""
    text = score_by_kit(Kit("/no", "ms-vlmeval 0.0.20"), tmp_path / "out", answers_of(tmp_path, ["mmvet"]), HEADER)
    assert "needs a judge" in lines_of(text)["MM-Vet"]


def test_what_the_kit_is_given(tmp_path):
    """The user's file by its full path, the answers asked for, and letters only where a file may lack them."""
    work = f"json.dump([job, dict(os.environ), os.getcwd()], open({str(tmp_path / 'given')!r}, 'w'))"
    asked = answers_of(tmp_path, ["seed", "mmbench_en"], limit=3)
    score_by_kit(find_kit(stand_in(tmp_path, work=work)), tmp_path / "out", asked, HEADER)
    job, environment, folder = json.loads((tmp_path / "given").read_text())
    assert set(job["SEEDBench_IMG"]["answers"]) == {row["index"] for row in asked[0].rows} and len(asked[0].rows) == 3
    assert job["SEEDBench_IMG"]["file"] == str((tmp_path / "data/SEEDBench_IMG.tsv").resolve())
    assert job["SEEDBench_IMG"]["truths"] == {}
    assert job["MMBench_TEST_EN"]["truths"] == {row["index"]: row["answer"] for row in asked[1].rows}
    # The kit keeps what it writes away from the user's files, and finds nothing to download into.
    assert environment["LMUData"] == folder and environment["PRED_FORMAT"] == "tsv"
    assert not Path(folder).exists() and sorted(os.listdir(tmp_path / "data")) == [
        "MMBench_TEST_EN.tsv",
        "SEEDBench_IMG.tsv",
    ]


WRITE = "open(sys.argv[3], 'w').write('{}'); sys.exit()"


@pytest.mark.parametrize("work, match", [
    ("print('begun'); raise KeyError('answer')", r"E-KIT\] .*vlmevalkit.log: VLMEvalKit failed; found KeyError: 'answ"),
    ("sys.exit(7)", r"E-KIT\] .* failed; found exit status 7"),
    ("sys.exit(0)", r"E-KIT\] .*vlmevalkit.log: VLMEvalKit wrote no tables; found FileNotFoundError"),
    (WRITE.format('{"kit": 1, "tables": {}}'), r"E-KIT\] .*; found ValueError: a table without figures, or no version"),
    (WRITE.format('{"kit": "x", "tables": {}}'), r"wrote no tables; found KeyError: 'SEEDBench_IMG'"),
    (WRITE.format('{"kit": "x", "tables": {"SEEDBench_IMG": [{}]}}'), r"wrote no tables; found ValueError: a table wi"),
    (WRITE.format("no JSON"), r"wrote no tables; found JSONDecodeError"),
    ("os.kill(os.getpid(), 9)", r"E-MEMORY\] .*VLMEvalKit was killed"),
])  # fmt: skip
def test_a_kit_that_fails_is_refused(tmp_path, work, match):
    kit = find_kit(stand_in(tmp_path, work=work))
    with pytest.raises(Refusal, match=match):
        score_by_kit(kit, tmp_path / "out", answers_of(tmp_path, ["seed"]), HEADER)
    assert not (tmp_path / "out/seed/vlmevalkit.json").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"seed", "results.md", "vlmevalkit.log"}
    if "begun" in work:
        log = (tmp_path / "out/vlmevalkit.log").read_text()
        assert "begun" in log and "Traceback" in log


def test_no_kit_or_no_python_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Refusal, match=r"E-PACKAGE\] .*python:--kit_python: VLMEvalKit is not installed .*ms-vlmeval=="):
        find_kit(stand_in(tmp_path, kit=None))
    with pytest.raises(Refusal, match=r"C-PATH\] --kit_python: no such program; found /no/python"):
        find_kit("/no/python")
    with pytest.raises(Refusal, match=r"C-PATH\] /.*/true:--kit_python: no Python"):
        find_kit("true")
    with pytest.raises(Refusal, match=r"C-PATH\] .*python:--kit_python: no Python; found \[1\]"):
        (tmp_path / "python").write_text("#!/bin/sh\necho '[1]'\n")
        find_kit(str(tmp_path / "python"))
    monkeypatch.chdir(tmp_path)
    stand_in(tmp_path)
    assert find_kit("./python") == Kit(str(tmp_path / "python"), "ms-vlmeval 0.0.20")


def test_this_python_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path))
    assert find_kit(None).python == str(tmp_path / "python")


@pytest.mark.slow
def test_the_real_kit_has_the_same_numbers(tmp_path):
    """Odd predictions too; and the user's files are as they were."""
    kit, files = find_kit(kit_python()), tiny_files(random.Random(3))
    files["AI2D_TEST"] = tiny_files(random.Random(4))["SEEDBench_IMG"]
    asked = []
    for name in (*SCORED, "ai2d"):
        text, predictions = files[BENCHMARKS[name].file]
        predictions |= dict(zip(list(predictions)[::2], ODD * 2, strict=False))
        asked.append(answered(tmp_path / "out", tmp_path / "data", name, text, predictions))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "data").iterdir()}
    text = score_by_kit(kit, tmp_path / "out", asked, HEADER)
    verdicts = {title: line for title, line in lines_of(text).items() if title in text and "benchmark" not in line}
    assert len(verdicts) == 1 + 2 + 2 + 5 and sum("the same" in line for line in verdicts.values()) == 2 + 2 + 5, text
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "data").iterdir()} == before
    for questions in asked:
        kept = json.loads((tmp_path / "out" / questions.benchmark.name / "vlmevalkit.json").read_text())
        assert kept["different"] == [] and kept["kit"] == kit.version and kept["figures"]["kit"].get("Overall", 1) > 0


@pytest.mark.slow
def test_the_real_kit_where_pandas_reads_otherwise_or_answers_are_elsewhere(tmp_path):
    """An option None, which pandas hides; letters from another file; and a sample of MME."""
    kit, (mmbench, predictions) = find_kit(kit_python()), tiny_files(random.Random(5))["MMBench_TEST_EN"]
    columns = ["index", "image", "question", "A", "B", "answer", "category"]
    options = [{"index": str(n), "image": image(n), "question": "q", "A": "red", "B": "None", "answer": "B",
                "category": "c"} for n in range(4)]  # fmt: skip
    hidden = answered(tmp_path / "out", tmp_path / "data", "seed", tsv(columns, options), dict.fromkeys("0123", "B"))
    (tmp_path / "data/MMBench.tsv").write_text(mmbench, encoding="utf-8")
    without = mmbench.replace("\tanswer\t", "\tthe answer\t", 1)
    elsewhere = answered(tmp_path / "out", tmp_path / "data", "mmbench_en", without, predictions)
    mme = answered(tmp_path / "out", tmp_path / "data", "mme", *tiny_files(random.Random(6))["MME"], limit=5)
    lines = lines_of(text := score_by_kit(kit, tmp_path / "out", [hidden, elsewhere, mme], HEADER))
    assert "0.00       | 100.00" in lines["SEED-Bench image"] and "2 of 2 figures differ" in lines["SEED-Bench image"]
    assert "pandas hides text of 4 rows from VLMEvalKit" in text
    assert "the same" in lines["MMBench EN (test)"] and "the same" in lines["MME"]


@pytest.mark.slow
def test_an_index_that_pandas_reads_otherwise_is_refused(tmp_path):
    kit, (text, predictions) = find_kit(kit_python()), tiny_files(random.Random(5))["TextVQA_VAL"]
    asked = answered(tmp_path / "out", tmp_path / "data", "textvqa", text.replace("\n34602\t", "\n0034602\t"),
                     predictions | {"0034602": "x"})  # fmt: skip
    with pytest.raises(Refusal, match=r"E-KIT\] .* failed; found pandas reads no row of index 0034602 in .*TextVQA"):
        score_by_kit(kit, tmp_path / "out", [asked], HEADER)
