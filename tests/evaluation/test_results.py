"""Results: what is kept can be read again, and the table says what a number is and is not."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.evaluation.compare import compare
from llava_moslora.evaluation.reading import RULES
from llava_moslora.evaluation.results import (
    PAPER_ROWS,
    Result,
    average,
    check_comparable,
    comparison_table,
    read_result,
    read_results,
    table,
    write_result,
    write_results,
)
from llava_moslora.evaluation.scoring import score
from support.golden_cases import tiny_files

FILES = tiny_files(random.Random(0))
JUDGED = "paper, by LLaVA_XTuner: beams of 5, sampled at temperature 1; judge gpt-4-1106-preview"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("results"), {}
    for name in ("mmbench_en", "seed", "textvqa", "mathvista", "mmvet", "mme"):
        benchmark = BENCHMARKS[name]
        text, answers = FILES[benchmark.file]
        (folder / f"{benchmark.file}.tsv").write_text(text, encoding="utf-8")
        rows = open_benchmark(benchmark, folder).rows
        header = {"benchmark": name, "data": "d", "prompts": "prompts-2024", "max_new_tokens": 5, "limit": None}
        made[name] = Result(header, score(benchmark.kind, rows, answers, RULES["rules-2024"]))
    return made


def test_results_are_read_as_they_were_written(results, tmp_path):
    for name, result in results.items():
        (tmp_path / name).mkdir()
        write_result(tmp_path / name, result)
    assert read_results(tmp_path) == results


def test_the_table_names_score_interval_unread_share_and_the_papers_number(results):
    lines = table(results, [], "llama-3-moslora-kaiming").splitlines()
    seed = next(line for line in lines if line.startswith("| SEED-Bench image"))
    _, title, value, interval, unread, paper, _, _ = (cell.strip() for cell in seed.split("|"))
    right = sum(unit.value for unit in results["seed"].score.units) / len(results["seed"].score.units)
    low, high = results["seed"].interval
    assert (title, value, paper) == ("SEED-Bench image", f"{right:.1f}", "68.9") and low < right < high
    assert interval == f"{low:.1f} to {high:.1f}" and unread == f"{results['seed'].score.unread:.1%}" != "0.0%"
    judged = next(line for line in lines if line.startswith("| MM-Vet"))
    assert "| –" in judged and "needs a judge" in judged and "33.8" in judged and "0.0 to" not in judged
    bound = next(line for line in lines if line.startswith("| MathVista"))
    assert "lower bound by rules" in bound
    assert f"- MathVista: lower bound by rules; {JUDGED}" in lines
    text = "\n".join(lines)
    assert "rules-2024 (VLMEvalKit ab638e4a" in text and "greedy, without a judge" in text
    assert "No average: 4 of 9 benchmarks have a score that is not a lower bound." in text and "| average" not in text
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_what_is_missing_or_a_sample_is_named(results):
    text = table({"seed": replace(results["seed"], header=results["seed"].header | {"limit": 60})}, ["ai2d", "mme"])
    assert "missing: AI2D_TEST.tsv (ai2d), MME.tsv (mme)." in text
    assert "a sample of 60 rows" in text and "68.9" not in text


def test_an_average_only_of_all_nine(results):
    nine = dict.fromkeys(BENCHMARKS, results["seed"])
    assert average(nine) == pytest.approx(results["seed"].score.value)
    assert "| average" in table(nine, [], "internlm2-qlora") and "57.8" in table(nine, [], "internlm2-qlora")
    assert average({name: r for name, r in nine.items() if name != "mme"}) is None
    assert average(nine | {"mmvet": results["mmvet"]}) is None


def judged(folder, name, model="gpt-4", host="h:80"):
    """A benchmark's result with a judge that says "1" of every answer."""
    benchmark = BENCHMARKS[name]
    text, answers = FILES[benchmark.file]
    (folder / f"{benchmark.file}.tsv").write_text(text, encoding="utf-8")
    header = {"benchmark": name, "data": "d", "prompts": "prompts-2024", "max_new_tokens": 5, "limit": None}
    header |= {"judge": model, "judge_host": host, "judge_prompts": "p"}
    rows = open_benchmark(benchmark, folder).rows
    return Result(header, score(benchmark.kind, rows, answers, RULES["rules-2024"], dict.fromkeys(answers, "1")))


def test_who_judged_is_named(results, tmp_path):
    both = results | {name: judged(tmp_path, name) for name in ("mathvista", "mmvet")}
    lines = table(both, []).splitlines()
    for title, value in (("MathVista", both["mathvista"].score.value), ("MM-Vet", 100)):
        line = next(line for line in lines if line.startswith(f"| {title}"))
        assert line.split("|")[-2].strip() == "judge gpt-4 at h:80" and f"| {value:.1f} " in line
    assert f"- MM-Vet: judge gpt-4 at h:80; {JUDGED}" in lines
    text = "\n".join(lines)
    assert "Answers are greedy, with a judge for MathVista and MM-Vet." in text and "without a judge" not in text
    assert "No average: 6 of 9" in text
    one = table(results | {"mmvet": both["mmvet"]}, [])
    assert "greedy, with a judge for MM-Vet." in one and "| lower bound by rules" in one and "No average: 5 of 9" in one


def test_the_average_names_how_it_was_made_and_takes_no_lower_bound(results, tmp_path):
    vet, maths = judged(tmp_path, "mmvet"), judged(tmp_path, "mathvista", "other", "i")
    nine = dict.fromkeys(BENCHMARKS, results["seed"]) | {"mmvet": vet, "mathvista": results["mathvista"]}
    assert average(nine) is None and "No average: 8 of 9" in table(nine, [])
    nine["mathvista"] = maths
    assert average(nine) == pytest.approx(sum(result.score.value for result in nine.values()) / 9)
    line = next(line for line in table(nine, []).splitlines() if line.startswith("| average"))
    assert line.split("|")[-2].strip() == "greedy, judge gpt-4 at h:80, judge other at i"


def test_other_judges_are_not_compared(results, tmp_path):
    a, b, elsewhere = (judged(tmp_path, "mmvet", *who) for who in (("gpt-4",), ("other",), ("gpt-4", "another:1")))
    with pytest.raises(Refusal, match=r"C-COMPARE\] mmvet\.judge: not judged in the same way; found gpt-4 and other"):
        check_comparable({"mmvet": a}, {"mmvet": b})
    with pytest.raises(Refusal, match=r"not judged in the same way; found None and gpt-4; fix: evaluate both"):
        check_comparable({"mmvet": results["mmvet"]}, {"mmvet": a})
    check_comparable({"mmvet": a}, {"mmvet": elsewhere})


def test_the_files(results, tmp_path):
    text = write_results(tmp_path, "runs/x", results, ["ai2d"], "llama-3-lora")
    assert text in (tmp_path / "results.md").read_text(encoding="utf-8")
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert content["missing"] == ["ai2d"] and content["average"] is None and content["source"] == "runs/x"
    mme = content["benchmarks"]["mme"]
    assert mme["paper"] == PAPER_ROWS["llama-3-lora"]["mme"] == 58.4 and mme["score"] == results["mme"].score.value
    assert mme["rules"] == "rules-2024" and set(mme["by"]) == {"subtask", "total"} and mme["answers"] == 140
    assert content["benchmarks"]["mmvet"]["score"] is None and content["benchmarks"]["mmvet"]["interval"] is None


def test_rows_of_the_paper():
    assert list(PAPER_ROWS) == [
        "llama-3-lora", "llama-3-moslora-orthogonal", "llama-3-moslora-kaiming", "internlm2-qlora",
        "internlm2-qmoslora-orthogonal", "internlm2-qmoslora-kaiming",
    ]  # fmt: skip


WRONG = {  # key → a value that it cannot have
    "header.benchmark": "-1",
    "header.prompts": {},
    "score.rules": "none",
    "score.outcomes.0.index": None,
    "score.by.subtask.OCR": {},
}


@pytest.mark.parametrize("key", WRONG)
def test_a_result_with_a_wrong_value_is_refused(tmp_path, key):
    outcome = {"index": "1", "read": None, "rule": "unread", "right": 0.0}
    score = {"value": 1, "rules": "rules", "units": [], "by": {"subtask": {"OCR": 1.0}}, "outcomes": [outcome]}
    content: Any = {"header": {"benchmark": "mme", "prompts": "prompts"}, "score": score}
    (tmp_path / "score.json").write_text(json.dumps(content))
    assert read_result(tmp_path / "score.json").score.by == score["by"]
    *above, name = [int(word) if word.isdigit() else word for word in key.split(".")]
    inner = content
    for word in above:
        inner = inner[word]
    inner[name] = WRONG[key]
    (tmp_path / "score.json").write_text(json.dumps(content))
    with pytest.raises(Refusal, match=rf"K-JSON\] .*score.json:{key}: not the score of a benchmark; found .*evaluate"):
        read_result(tmp_path / "score.json")


@pytest.mark.parametrize("content", ["{}", "[]", "x", '{"header": {}, "score": {}}', '{"header": 1, "score": 2}'])
def test_a_damaged_result_is_refused(tmp_path, content):
    (tmp_path / "score.json").write_text(content)
    with pytest.raises(Refusal, match=r"K-JSON\] .*score.json"):
        read_result(tmp_path / "score.json")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"C-PATH\] .*no results"):
        read_results(tmp_path)


@pytest.mark.parametrize("field, value", [("data", "e"), ("prompts", "prompts"), ("limit", 5), ("max_new_tokens", 6)])
def test_other_questions_are_not_compared(results, field, value):
    other = {"seed": replace(results["seed"], header=results["seed"].header | {field: value})}
    with pytest.raises(Refusal, match=rf"C-COMPARE\] seed\.{field}: not asked in the same way; found .* and {value}"):
        check_comparable(results, other)
    check_comparable(results, {"seed": results["seed"]})


def test_a_comparison_as_a_table(results):
    scores = {name: result.score for name, result in results.items()}
    text = comparison_table(compare(scores, scores))
    assert text.count("inside the noise") == 5 + 2 and "+0.0 to +0.0" not in text and "MM-Vet" not in text
