"""Questions per second: this package's evaluation and VLMEvalKit's loop, with one model and the same questions.

    python benchmarks/evaluate.py [--model FOLDER] [--data FOLDER] [--questions 128]    # after `make demo`
    python benchmarks/evaluate.py --tiny         # random models; the numbers mean nothing, nothing is written

The kit's side is its ``infer_data`` where VLMEvalKit is installed (``pip install ms-vlmeval``), with this package's
model class. Elsewhere it is the same loop written out: one question at a time, its image from a file, through the
functions of that class, ``empty_cache()`` on a GPU after each, all answers pickled after every tenth. Ours is what
``scripts/evaluate.py --benchmark seed`` does once the model is loaded. All sides share one loaded model and are timed
interleaved, the best of the repeats counts; on a CPU it is the processor time of one thread, so that other load does
not matter. Loading and a warm-up pass, in which the kit also writes its images, are not timed. At batch
size 1 every answer must equal the kit's.
"""

from __future__ import annotations

import argparse
import base64
import csv
import importlib.metadata
import importlib.util
import json
import logging
import os
import pickle
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from adapter import machine

from llava_moslora.errors import Refusal, run_script
from llava_moslora.evaluation.ask import Questions, ask, read_answers
from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.evaluation.vlmevalkit import SHORT_ANSWER, model_class, prompt, question
from llava_moslora.inference.generate import answer
from llava_moslora.inference.load import ChatModel, load

ROOT = Path(__file__).parents[1]
BENCHMARK, NAME = BENCHMARKS["seed"], "questions"  # the kit knows the benchmark's own name and would download its file
BATCH_SIZES, FASTER = (1, 16), 2.0  # at batch size 16, as a ratio to the kit's loop
Side = Callable[[], dict[str, str]]  # asks everything, and returns index → answer


def make_tiny(folder: Path) -> tuple[Path, Path]:
    """A run of the tests' random models, and a file of the tests' questions."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.export_runs import trained_run
    from support.golden_cases import tiny_files
    from support.tiny import write_clip, write_llm, write_projector

    parts = write_llm(folder / "llm"), write_clip(folder / "clip"), write_projector(folder / "projector.safetensors")
    trained_run(folder / "run", *parts)
    file = f"{BENCHMARK.file}.tsv"
    (folder / file).write_text(tiny_files(random.Random(0))[BENCHMARK.file][0], encoding="utf-8")
    return folder / "run", folder


def selected(data: Path, questions: Questions, folder: Path) -> Path:
    """The questions' rows of the benchmark's file as a file of their own, which the kit reads as it is."""
    kept = {row["index"] for row in questions.rows}
    with open(data / f"{BENCHMARK.file}.tsv", newline="", encoding="utf-8") as source:
        header, *rows = csv.reader(source, delimiter="\t")
    with open(folder / f"{NAME}.tsv", "w", newline="", encoding="utf-8") as target:
        index = header.index("index")
        csv.writer(target, delimiter="\t").writerows([header, *(row for row in rows if row[index] in kept)])
    return folder / f"{NAME}.tsv"


def kit_side(model: Path, folder: Path) -> tuple[Side, ChatModel]:
    """VLMEvalKit's own loop over ``questions.tsv`` in ``folder``."""
    os.environ["LMUData"] = str(folder)  # noqa: SIM112
    from vlmeval.dataset import build_dataset
    from vlmeval.inference import infer_data

    instance, dataset, file = model_class()(str(model)), build_dataset(NAME), folder / "kit.pkl"

    def side() -> dict[str, str]:
        file.unlink(missing_ok=True)
        infer_data(instance, "model", str(folder), dataset, str(file))
        return {str(index): text for index, text in pickle.loads(file.read_bytes()).items()}

    return side, instance.chat_model


def loop_side(chat_model: ChatModel, file: Path, folder: Path) -> Side:
    """The kit's loop written out; images become files once, as ``dump_image`` makes them."""
    csv.field_size_limit(2**31 - 1)
    with open(file, newline="", encoding="utf-8") as stream:
        rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(stream, delimiter="\t")]
    for row in rows:
        (folder / f"{row['index']}.png").write_bytes(base64.b64decode(row.pop("image")))

    def side() -> dict[str, str]:
        answers = {}
        for number, row in enumerate(rows, start=1):
            message = [{"type": "image", "value": str(folder / f"{row['index']}.png")}]
            message += [{"type": "text", "value": prompt(row, "MCQ")}]
            answers[row["index"]] = next(answer(chat_model, [question(message)], max_new_tokens=SHORT_ANSWER))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if number % 10 == 0:
                (folder / "loop.pkl").write_bytes(pickle.dumps(answers))
        return answers

    return side


def our_side(chat_model: ChatModel, data: Path, batch_size: int, limit: int | None) -> Side:
    """What evaluate.py does: open the file, ask everything into an empty folder, read the answers."""

    def side() -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            questions = questions_of(data, batch_size, limit)
            ask(chat_model, questions, {}, Path(folder))
            return read_answers(Path(folder), {})[1]

    return side


def questions_of(data: Path, batch_size: int, limit: int | None) -> Questions:
    table = open_benchmark(BENCHMARK, data)
    return Questions.of(BENCHMARK, table, prompts="prompts-2024", batch_size=batch_size, limit=limit)


def measure(sides: dict[str, Side], repeats: int, clock: Callable[[], float]) -> dict[str, dict]:
    """Side → the seconds of its best repeat and its answers, after a warm-up pass of every side."""
    found = {name: {"seconds": float("inf"), "answers": side()} for name, side in sides.items()}
    for _ in range(repeats):
        for name, side in sides.items():  # interleaved, so that other load affects all
            start = clock()
            answers = side()
            found[name]["seconds"] = min(found[name]["seconds"], clock() - start)
            assert answers == found[name]["answers"], f"{name} gave different answers the second time"
    return found


def report(loop: str, found: dict[str, dict], args: argparse.Namespace) -> dict:
    """The table, printed; and what is written."""
    kit = found["kit"]
    count, rows = len(kit["answers"]), {}
    print(f"{machine(args.device)}; {count} questions; the kit's loop: {loop}\n")
    for name, side in found.items():
        other = sum(side["answers"][index] != text for index, text in kit["answers"].items())
        rows[name] = {"questions_per_s": round(count / side["seconds"], 3), "answers_unlike_the_kits": other}
        rows[name]["ratio"] = round(kit["seconds"] / side["seconds"], 3)
        speed = f"{count / side['seconds']:8.2f} questions/s {rows[name]['ratio']:7.2f} ×"
        print(f"{name:14} {speed} {other:5} answers differ")
    target = {"what": f"questions/s at batch size {BATCH_SIZES[-1]}", "at_least": FASTER}
    target["found"] = rows[f"ours, batch {BATCH_SIZES[-1]}"]["ratio"]
    print("\n{what}: {found} × the kit's loop, at least {at_least}".format(**target))
    return {
        "machine": machine(args.device), "torch": torch.__version__,
        "kit": loop, "model": args.model.name, "questions": count, "repeats": args.repeats, "sides": rows,
        "targets": [target],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "playground/runs/demo-merged", help="a run or an export")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "playground/data/easy_vqa_as_seed",
        help=f"folder with {BENCHMARK.file}.tsv",
    )  # fmt: skip
    parser.add_argument("--questions", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3, help="the best counts")
    parser.add_argument("--tiny", action="store_true", help="random models: to test the code")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/evaluate-DEVICE.json")
    args = parser.parse_args()
    logging.getLogger("llava_moslora").setLevel(logging.ERROR)  # it is not the file that the kit names
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        if args.tiny:
            args.model, args.data = make_tiny(folder)
        elif not args.model.is_dir():
            raise Refusal("E-MISSING", "no model", file=args.model, key="--model", fix="run make demo, or name one")
        asked = questions_of(args.data, 1, args.questions)
        file = selected(args.data, asked, folder)
        if importlib.util.find_spec("vlmeval"):
            kit, chat_model = kit_side(args.model, folder)
            loop = f"infer_data of ms-vlmeval {importlib.metadata.version('ms-vlmeval')}"
        else:
            chat_model = load(args.model)
            kit, loop = loop_side(chat_model, file, folder), "infer_data, written out"
        sides = {"kit": kit}
        sides |= {f"ours, batch {size}": our_side(chat_model, args.data, size, args.questions) for size in BATCH_SIZES}
        found = measure(sides, args.repeats, time.process_time if args.device == "cpu" else time.perf_counter)
    result = report(loop, found, args)
    if output := args.output or (None if args.tiny else ROOT / f"benchmarks/results/evaluate-{args.device}.json"):
        output.parent.mkdir(exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    if result["sides"]["ours, batch 1"]["answers_unlike_the_kits"]:
        sys.exit("error: at batch size 1 the answers are not those of the kit's loop")


if __name__ == "__main__":
    run_script(main)
