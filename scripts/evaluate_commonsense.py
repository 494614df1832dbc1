"""The paper's Table 4: a run or a model on the eight commonsense sets, with LLM-Adapters' protocol.

    python scripts/evaluate_commonsense.py runs/commonsense --data LLM-Adapters/dataset --output results/commonsense

FOLDER/test.json of the eight sets are read from --data; nothing is downloaded. Uses lm-evaluation-harness:
pip install 'llava_moslora[commonsense]'. --tasks likelihood runs the harness's own tasks, on TASK.jsonl in --data.
Every finished set is saved in --output; the same command continues.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal, run_script
from llava_moslora.evaluation.commonsense_sets import PAPER, SETS
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("model", help="a text-only run, or the folder of an LLM: an export of --format llm")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="LLM-Adapters' dataset/, or of TASK.jsonl")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for answers and results")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), metavar="SET", help=" ".join(SETS))
    tasks = "llm_adapters: the paper's protocol; likelihood: the harness's own tasks, a second table"
    parser.add_argument("--tasks", default="llm_adapters", choices=["llm_adapters", "likelihood"], help=tasks)
    parser.add_argument(
        "--batch_size", type=int, default=1, metavar="N", help="questions per batch; default: 1, as in the reference"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records of each set")
    paper = f"row of Table 4 to print next to it: {', '.join(PAPER)}; default: moslora"
    parser.add_argument("--paper", choices=list(PAPER), metavar="ROW", help=paper)
    args = parser.parse_args(argv)
    if args.paper and args.tasks == "likelihood":
        what = "has no effect: Table 4 does not have these tasks"
        raise Refusal("C-FLAG", what, key="--paper", found=args.paper, fix="omit it")
    for name in ("batch_size", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected="at least 1")
    return args


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

from llava_moslora.evaluation.ask import model_header, source_header
from llava_moslora.evaluation.commonsense import (
    as_json,
    ask,
    find_files,
    harness,
    language_model,
    read_kept,
    score,
    table,
)
from llava_moslora.evaluation.likelihood import (
    PREFIX,
    ask_likelihood,
    find_stock_files,
    likelihood_json,
    likelihood_table,
    score_likelihood,
)
from llava_moslora.evaluation.output import locked, new_output
from llava_moslora.files.disk import replace_file, replace_json
from llava_moslora.files.manifest import sha256
from llava_moslora.inference.load import load
from llava_moslora.runs.checkpoints import model_checkpoint
from llava_moslora.runs.record import RUN


def main() -> None:
    args = parse(sys.argv[1:])
    harness()
    likelihood = args.tasks == "likelihood"
    files = (find_stock_files if likelihood else find_files)(args.data, args.sets)
    output = new_output(args.output)
    with locked(output / ".lock"):
        answers = evaluate(args, files, output)
        if likelihood:
            found = {name: score_likelihood(samples) for name, samples in answers.items()}
            stem, text, numbers = "likelihood", likelihood_table(found), likelihood_json(found)
        else:
            scores = {name: score(samples) for name, samples in answers.items()}
            stem, text, numbers = "results", table(scores, args.paper or "moslora"), as_json(scores)
        replace_file(output / f"{stem}.md", f"```\n{text}\n```\n".encode())
        replace_json(output / f"{stem}.json", numbers)
    print(text)


def evaluate(args: argparse.Namespace, files: dict[str, Path], output: Path) -> dict[str, list[dict[str, Any]]]:
    """Ask what is not in ``output`` yet; the model is loaded only if anything is asked. All answers that are there."""
    ask_set, prefix, same = ask, "", {}
    check: Callable[[Any], Any] = score
    if args.tasks == "likelihood":
        ask_set, prefix, check = ask_likelihood, PREFIX, score_likelihood
        same = {"lm_eval": version("lm_eval")}  # whose tasks these are
    folder = Path(args.model)
    checkpoint = model_checkpoint(folder) if (folder / RUN).is_file() else None
    header = source_header(folder, checkpoint) | {"batch_size": args.batch_size, "limit": args.limit} | same
    headers = {name: header | ({"data": sha256(files[name])} if name in files else {}) for name in SETS}
    kept, model = read_kept(output, headers, prefix, check), None
    for name in files:
        if name in kept:
            continue
        if model is None:
            chat_model = load(folder, checkpoint=checkpoint)
            read_kept(output, {name: model_header(chat_model) for name in kept}, prefix, check)
            model = language_model(chat_model, args.batch_size)
        kept[name] = ask_set(model, name, files[name], args.limit)
        asked = headers[name] | model_header(chat_model)
        replace_json(output / f"{prefix}{name}.json", {"header": asked, "samples": kept[name]})
    return {name: kept[name] for name in SETS if name in kept}


if __name__ == "__main__":
    run_script(main)
