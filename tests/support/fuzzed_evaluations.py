"""Readers of questions, answers and scores, each with files that they accept."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from llava_moslora.evaluation.ask import Questions, read_answers
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.evaluation.commonsense import find_files
from llava_moslora.evaluation.compare import compare
from llava_moslora.evaluation.judge import Judge, judge_answers
from llava_moslora.evaluation.mistakes import answered_by_both, choose
from llava_moslora.evaluation.question_file import earlier_answers, read_questions
from llava_moslora.evaluation.reading import RULES
from llava_moslora.evaluation.results import comparison_table, read_results, table, write_results
from llava_moslora.evaluation.scoring import score
from llava_moslora.export.card_data import read_scores
from llava_moslora.files.manifest import MANIFEST, sha256
from support.commonsense import write_sets
from support.evaluations import FILES, evaluated, write_data
from support.fuzzing import Reader
from support.run_folders import save


def _write_questions(folder: Path) -> None:
    rows = [{"id": k, "image": f"{k}.png", "question": "what?", "answer": "red"} for k in range(4)]
    (folder / "questions.json").write_text(json.dumps(rows))


def _write_earlier(folder: Path) -> None:
    lines = [{"run": "x", "batch_size": 2}, "red", "blue", "green"]
    (folder / "answers.unfinished").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_table(folder: Path, name: str) -> None:
    benchmark = BENCHMARKS[name]
    of = open_benchmark(benchmark, folder)
    questions = Questions.of(benchmark, of, prompts="prompts-2024", batch_size=2, limit=5)
    for number in questions.numbers:
        questions.image_and_prompt(number)
    answers = {row["index"]: FILES[benchmark.file][1].get(row["index"], "A") for row in of.rows}
    score(benchmark.kind, of.rows, answers, RULES["rules-2024"])


def _write_table(folder: Path, name: str) -> None:
    write_data(folder, [name])
    file = folder / f"{BENCHMARKS[name].file}.tsv"
    file.write_bytes(file.read_bytes())


NAMES = ("mmbench_en", "mme")


def _evaluated(folder: Path) -> None:
    (folder / "data").mkdir()
    evaluated(folder / "out", write_data(folder / "data", NAMES), NAMES)


def _read_results(folder: Path) -> None:
    results = read_results(folder / "out")
    table(results, [])
    write_results(folder / "out", "source", results, [], "")
    comparison_table(compare({k: r.score for k, r in results.items()}, {k: r.score for k, r in results.items()}))
    for answered in answered_by_both(folder / "data", [folder / "out"], [results]):
        choose(answered, 5)


def _write_summary(folder: Path) -> None:
    _evaluated(folder)
    save(folder / "run", 2)
    asked = {"model": sha256(folder / "run" / "checkpoint-2" / MANIFEST), "checkpoint": "checkpoint-2"}
    results = read_results(folder / "out")
    results = {name: replace(result, header=result.header | asked) for name, result in results.items()}
    write_results(folder / "out", "source", results, [], "")


def _read_summary(folder: Path) -> None:
    trained = SimpleNamespace(run=folder / "run", checkpoint=folder / "run" / "checkpoint-2")
    read_scores(folder / "out", trained)


class _Silent(Judge):
    def _send(self, body):
        return 200, json.dumps({"choices": [{"message": {"content": "0.5"}}]}), ""


def _write_judged(folder: Path) -> None:
    write_data(folder, ["mmvet"])
    (folder / "out").mkdir()
    _judge(folder, _Silent("http://127.0.0.1:9/v1", "m", waits=()))


def _judge(folder: Path, judge: Judge) -> None:
    benchmark = BENCHMARKS["mmvet"]
    questions = Questions.of(benchmark, open_benchmark(benchmark, folder), prompts="prompts-2024", batch_size=2)
    answers = {row["index"]: FILES[benchmark.file][1][row["index"]] for row in questions.rows}
    judged, _ = judge_answers(judge, questions, answers, RULES["rules-2024"], folder / "out")
    score(benchmark.kind, questions.rows, answers, RULES["rules-2024"], judged)


def _read_reply(folder: Path) -> None:
    class Says(Judge):
        def _send(self, body):
            return 200, (folder / "reply.json").read_bytes().decode(errors="replace"), ""

    _judge(folder, Says("http://127.0.0.1:9/v1", "m", waits=()))


def _write_reply(folder: Path) -> None:
    write_data(folder, ["mmvet"])
    (folder / "out").mkdir()
    (folder / "reply.json").write_text(json.dumps({"choices": [{"message": {"content": "0.5", "role": "a"}}]}))


READERS = [
    Reader("question file", {"questions.json": "json"}, _write_questions,
           lambda f: read_questions(f / "questions.json")),
    Reader("unfinished answers", {"answers.unfinished": "jsonl"}, _write_earlier,
           lambda f: earlier_answers(f / "answers.unfinished", {"run": "x", "batch_size": 2}, 2)),
    *(Reader(f"TSV {name}", {f"{BENCHMARKS[name].file}.tsv": "text"}, partial(_write_table, name=name),
             partial(_read_table, name=name)) for name in ("mmbench_en", "mme", "textvqa", "mathvista", "mmvet")),
    Reader("commonsense sets", {"boolq/test.json": "json"}, write_sets, lambda f: find_files(f, ["boolq"])),
    Reader("kept answers", {"out/mme/answers-0.jsonl": "jsonl"}, _evaluated,
           lambda f: (read_answers(f / "out" / "mme", {"benchmark": "mme"}), _read_results(f))),
    Reader("scores", {"out/mme/score.json": "json"}, _evaluated, _read_results),
    Reader("results.json", {"out/results.json": "json"}, _write_summary, _read_summary),
    Reader("judge.jsonl", {"out/judge.jsonl": "jsonl"}, _write_judged,
           lambda f: _judge(f, _Silent("http://127.0.0.1:9/v1", "m", waits=()))),
    Reader("judge's reply", {"reply.json": "json"}, _write_reply, _read_reply),
]  # fmt: skip
