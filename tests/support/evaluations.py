"""Output folders as ``scripts/evaluate.py`` leaves them, without a model: the answers are those of the golden files."""

import json
import random
from pathlib import Path

from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.evaluation.reading import RULES
from llava_moslora.evaluation.results import Result, write_result
from llava_moslora.evaluation.scoring import score
from support.golden_cases import tiny_files

FILES = tiny_files(random.Random(0))


def write_data(folder: Path, names) -> Path:
    """The benchmarks' TSV files."""
    for name in names:
        file = BENCHMARKS[name].file
        (folder / f"{file}.tsv").write_text(FILES[file][0], encoding="utf-8")
    return folder


def evaluated(folder: Path, data: Path, names, changes=None) -> Path:
    """Answers and scores of the benchmarks ``names``; ``changes``: (benchmark, index) → another answer."""
    for name in names:
        benchmark = BENCHMARKS[name]
        table = open_benchmark(benchmark, data)
        given = FILES[benchmark.file][1]
        answers = {row["index"]: (changes or {}).get((name, row["index"]), given[row["index"]]) for row in table.rows}
        header = {"benchmark": name, "data": table.md5, "prompts": "prompts-2024", "limit": None, "model": "m"}
        lines = [{"header": header}, *({"index": index, "answer": answer} for index, answer in answers.items())]
        (folder / name).mkdir(parents=True)
        (folder / name / "answers-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_result(folder / name, Result(header, score(benchmark.kind, table.rows, answers, RULES["rules-2024"])))
    return folder
