"""What lies in an output folder afterwards, and what is said of it below the table."""

import pytest
from PIL import Image

from llava_moslora.errors import Refusal
from llava_moslora.evaluation import report
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.evaluation.report import comparison, named, write_comparison, write_report
from llava_moslora.evaluation.results import read_results
from support.evaluations import evaluated, write_data

NAMES = ("mmbench_en", "mmbench_cn", "seed")
HINT = "No matching row of the paper: neither a run nor an export that records its base and its adapters."


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return write_data(tmp_path / "data", NAMES)


def reported(output, data, names=NAMES, **how):
    tables = {name: open_benchmark(BENCHMARKS[name], data) for name in names}
    return write_report(output, "runs/x", read_results(output), tables, **{"mistakes": 5, **how})


def files(folder):
    return sorted(file.name for file in folder.iterdir() if file.is_file())


def test_everything_lies_in_the_output_folder(tmp_path, data):
    output = evaluated(tmp_path / "out", data, NAMES)
    text = reported(output, data)
    assert files(output) == ["mistakes.html", "radar.png", "results.json", "results.md"]
    assert text.endswith(
        f"{HINT} --paper ROW shows one.\nAbilities of MMBench: radar.png.\nMistakes with their images: mistakes.html.\n"
    )
    assert text in (output / "results.md").read_text(encoding="utf-8")
    with Image.open(output / "radar.png") as image:
        assert image.text["Description"].startswith("CN Attribute Reasoning, 7 questions: x ")
    page = (output / "mistakes.html").read_text(encoding="utf-8")
    assert "<h1>Mistakes of runs/x</h1>" in page and 'data-benchmark="mmbench_cn"' in page


def test_what_cannot_be_drawn_is_said_and_nothing_old_stays(tmp_path, data):
    output = evaluated(tmp_path / "out", data, NAMES)
    reported(output, data)
    (output / "mmbench_cn" / "score.json").unlink()
    text = reported(output, data, ["mmbench_en"], mistakes=0, paper="none")
    assert "No radar.png: mmbench_cn was not evaluated.\n" in text and "mistakes.html" not in text and HINT not in text
    assert files(output) == ["results.json", "results.md"]
    (output / "mmbench_en" / "score.json").unlink()
    assert "radar" not in reported(output, data, ["seed"])


def test_the_page_names_results_whose_file_was_not_read(tmp_path, data):
    output = evaluated(tmp_path / "out", data, NAMES)
    reported(output, data, ["seed"])
    page = (output / "mistakes.html").read_text(encoding="utf-8")
    assert "Not on this page, because their files were not read: mmbench_en, mmbench_cn." in page


def test_a_row_that_is_known_is_next_to_the_scores(tmp_path, data, monkeypatch):
    output = evaluated(tmp_path / "out", data, NAMES)
    monkeypatch.setattr(report, "recognise_row", lambda source: ("llama-3-lora", f"llama-3-lora is {source}'s row."))
    text = reported(output, data)
    assert "| llama-3-lora |" in text and "72.0" in text and "llama-3-lora is runs/x's row.\n" in text
    for paper, number in (("internlm2-qlora", "70.8"), ("none", "| unread |  ")):
        text = reported(output, data, paper=paper)
        assert number in text and "72.0" not in text and "llama-3-lora" not in text


def test_a_comparison_with_everything(tmp_path, data):
    folders = [str(evaluated(tmp_path / name, data, NAMES)) for name in ("a", "b")]
    rows = open_benchmark(BENCHMARKS["mmbench_en"], data).rows
    changes = {("mmbench_en", row["index"]): row["answer"] for row in rows}
    folders[1] = str(evaluated(tmp_path / "c" / "b", data, NAMES, changes))
    results, output = [read_results(folder) for folder in folders], tmp_path / "out"
    output.mkdir()
    text = comparison(folders, results)
    below = write_comparison(output, text, folders, results, data=str(data), mistakes=100, normalise=True)
    assert below == "Abilities of MMBench: radar.png.\nWhat only A or only B got right: mistakes.html.\n"
    assert files(output) == ["comparison.md", "mistakes.html", "radar.png"]
    assert (output / "comparison.md").read_text(encoding="utf-8") == f"{text}\n{below}"
    assert text.startswith(f"A: {folders[0]}\nB: {folders[1]}\n\n| benchmark")
    with Image.open(output / "radar.png") as image:
        lines = image.text["Description"].splitlines()
    assert all(line.endswith(", b 100.0") for line in lines[6:]) and all(
        "a 100.0, b 100.0" in line for line in lines[:6]
    )
    page = (output / "mistakes.html").read_text(encoding="utf-8")
    assert page.count('data-state="B right, A wrong"') > 10 and 'data-state="A right, B wrong"' not in page
    below = write_comparison(output, text, folders, results, mistakes=100)
    assert below == "Abilities of MMBench: radar.png.\nNo mistakes.html: it needs --data.\n"
    assert files(output) == ["comparison.md", "radar.png"]
    (tmp_path / "empty").mkdir()
    below = write_comparison(output, text, folders, results, data=str(tmp_path / "empty"), mistakes=100)
    assert below.endswith(f"No mistakes.html: no file of theirs in {tmp_path / 'empty'}.\n")


def test_a_comparison_never_overwrites_an_evaluation(tmp_path, data):
    output = evaluated(tmp_path / "a", data, NAMES)
    reported(output, data)
    before = {file: (output / file).read_bytes() for file in files(output)}
    results = [read_results(output)] * 2
    with pytest.raises(Refusal, match=r"C-OUTPUT\] .*a:--output: the folder of an evaluation"):
        write_comparison(output, "", [str(output)] * 2, results, mistakes=1)
    assert before == {file: (output / file).read_bytes() for file in files(output)}


def test_names_of_curves():
    assert [name for name, _ in named(["results/a/", "results/b"], [{}, {}])] == ["a", "b"]
    assert [name for name, _ in named(["x/a", "y/a"], [{}, {}])] == ["x/a", "y/a"]
