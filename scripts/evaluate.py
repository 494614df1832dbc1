"""Evaluate a model: on the paper's benchmarks, on a question file, or compared with another model.

    python scripts/evaluate.py runs/demo --benchmark all --data benchmarks --output results/demo
    python scripts/evaluate.py results/a results/b --compare
    python scripts/evaluate.py results/a results/b results/c --radar radar.png
    python scripts/evaluate.py runs/demo --questions test.json --image_folder images --output answers.json

**Benchmarks**: the nine of the paper's Table 5 (mmbench_en mmbench_cn seed ai2d sciqa textvqa mathvista mmvet mme),
from VLMEvalKit's TSV files in --data; nothing is downloaded. Several GPUs: torchrun --nproc_per_node N in place of
python. Every answer is saved in --output at once: the same command continues where it was stopped, and scores
complete answers without loading the model. MathVista and MM-Vet need --judge for the paper's kind of score.

**Question file**: a JSON array of objects with ``id``, ``image``, ``question`` and ``answer``; each question is a
separate conversation. Every answer is saved in ``OUTPUT.unfinished`` at once.
"""

import argparse
import itertools
import logging
import os
import sys
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path

from llava_moslora.errors import Refusal, run_script

if __name__ == "__main__":
    run_script(lambda: None)  # a signal is one line also while the next ones are imported

from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.prompts import PROMPTS
from llava_moslora.evaluation.reading import RULES
from llava_moslora.evaluation.results import NO_ROW, PAGE, PAPER_ROWS
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries

SCORER = "vlmevalkit"
PER_BENCHMARK = 100  # mistakes on the page

# Mode → the flags it needs, and those it may have besides.
FLAGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "benchmark": (
        ("data", "output"),
        ("batch_size", "limit", "prompts", "rules", "judge", "paper", "scorer", "kit_python", "mistakes"),
    ),
    "questions": (("image_folder",), ("untrained", "blank", "output", "probe", "batch_size")),
    "compare": ((), ("output", "data", "mistakes", "normalise")),
    "radar": ((), ("normalise",)),
}


class Names(tuple):
    """Choices of a flag whose words may be several of them, separated by commas."""

    def __contains__(self, word: object) -> bool:
        return all(super(Names, self).__contains__(name) for name in str(word).split(",") if name)


def parse(argv: list[str]) -> tuple[argparse.Namespace, str]:
    """The flags, and the mode that they select."""
    parser = ScriptParser(__doc__)
    parser.add_argument("run", nargs="+", help="a run or an export; with --compare or --radar results")
    both = parser.add_argument_group("benchmarks and question file")
    both.add_argument(
        "--output", metavar="PLACE", help="folder of answers, results, a comparison; file for --questions"
    )
    both.add_argument("--batch_size", type=int, metavar="N", help="questions per batch; default: 16")
    benchmarks = parser.add_argument_group("benchmarks; --data and --mistakes with --compare too")
    names = Names([*BENCHMARKS, "all"])
    benchmarks.add_argument(
        "--benchmark", nargs="+", choices=names, metavar="NAME", help="one or several of the nine, or all"
    )
    benchmarks.add_argument("--data", metavar="FOLDER", help="folder with the benchmarks' TSV files")
    benchmarks.add_argument("--limit", type=int, metavar="N", help="run a sample of N questions of each benchmark")
    benchmarks.add_argument(
        "--prompts", choices=list(PROMPTS), metavar="SET",
        help=f"set of prompts: {', '.join(PROMPTS)}; the first is the paper's, and the default",
    )  # fmt: skip
    benchmarks.add_argument(
        "--rules", choices=list(RULES), metavar="SET",
        help=f"how answers are parsed: {', '.join(RULES)}; rules-2024 are the paper's, and the default",
    )  # fmt: skip
    benchmarks.add_argument(
        "--judge", nargs=2, metavar=("URL", "MODEL"),
        help="OpenAI-compatible server and its model that judge MathVista and MM-Vet; key: OPENAI_API_KEY",
    )  # fmt: skip
    benchmarks.add_argument(
        "--scorer", choices=[SCORER], metavar="NAME",
        help=f"{SCORER}: let the installed VLMEvalKit score the same answers as well",
    )  # fmt: skip
    benchmarks.add_argument("--kit_python", metavar="PATH", help="Python that has VLMEvalKit; this one by default")
    benchmarks.add_argument(
        "--paper", choices=[*PAPER_ROWS, NO_ROW], metavar="ROW",
        help=f"show a row of the paper's Table 5: {', '.join([*PAPER_ROWS, NO_ROW])}; default: the model's, if certain",
    )  # fmt: skip
    benchmarks.add_argument(
        "--mistakes", type=int, metavar="N", help=f"of each benchmark so many in {PAGE}, {PER_BENCHMARK} by default"
    )
    questions = parser.add_argument_group("question file")
    questions.add_argument("--questions", metavar="FILE", help="JSON array of questions")
    questions.add_argument("--image_folder", metavar="FOLDER", help="images of --questions")
    questions.add_argument(
        "--untrained", action="store_true", help="use the model as it was before the first training step"
    )
    questions.add_argument(
        "--blank", action="store_true", help="blank images: how much can be guessed from the questions"
    )
    questions.add_argument(
        "--probe", metavar="FILE", help="write the scores of every first token for the first 32 questions there"
    )
    results = parser.add_argument_group("existing results")
    results.add_argument("--compare", action="store_true", help="is the second of two results better than the first?")
    results.add_argument("--radar", metavar="FILE", help="plot the abilities of MMBench for one or several results")
    results.add_argument("--normalise", action="store_true", help="in the radar divide each axis by the best model")
    args = parser.parse_args(argv)
    return args, check_flags(args)


def check_flags(args: argparse.Namespace) -> str:
    """The mode that the flags ask for.

    Raises:
        Refusal: C-FLAG, none or several modes, a flag too few or too many, or a number out of range.
    """
    given = {name for name, value in vars(args).items() if name != "run" and value is not None and value is not False}
    modes = [name for name in FLAGS if name in given]
    if len(modes) != 1:
        raise Refusal(
            "C-FLAG", "exactly one of these flags is needed", found=" ".join(f"--{name}" for name in modes) or "none",
            expected=" | ".join(f"--{name}" for name in FLAGS),
        )  # fmt: skip
    needed, allowed = FLAGS[modes[0]]
    if lacking := [name for name in needed if name not in given]:
        raise Refusal("C-FLAG", f"missing: --{modes[0]} needs it", key=f"--{lacking[0]}")
    if "kit_python" in given and "scorer" not in given:
        raise Refusal("C-FLAG", "has no effect without --scorer", key="--kit_python", fix=f"--scorer {SCORER}")
    if other := sorted(given - {modes[0], *needed, *allowed}):
        raise Refusal("C-FLAG", f"has no effect with --{modes[0]}", key=f"--{other[0]}", fix="omit it")
    if modes[0] == "compare":
        for name, before in (("data", "output"), ("normalise", "output"), ("mistakes", "data")):
            if name in given and before not in given:
                raise Refusal("C-FLAG", f"missing: --{name} needs it", key=f"--{before}")
    for name, least in (("batch_size", 1), ("limit", 1), ("mistakes", 0)):
        if name in given and (value := getattr(args, name)) < least:
            raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=f"at least {least}")
    expected = 2 if modes[0] == "compare" else 1
    if len(args.run) != expected and modes[0] != "radar":
        what = "exactly two results can be compared" if expected == 2 else "exactly one run or export can be evaluated"
        raise Refusal("C-FLAG", what, key=f"--{modes[0]}", found=" ".join(args.run))
    if args.benchmark is not None:
        args.benchmark = list(dict.fromkeys(name for word in args.benchmark for name in word.split(",") if name))
    return modes[0]


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

import torch
from torch import distributed

from llava_moslora.distributed import from_all_ranks, from_rank_0, rank
from llava_moslora.evaluation.ask import Questions, ask, source_header
from llava_moslora.evaluation.checks import open_benchmark
from llava_moslora.evaluation.judge import Judge
from llava_moslora.evaluation.kit import find_kit, score_by_kit
from llava_moslora.evaluation.output import complete, locked, new_output, scored, writable
from llava_moslora.evaluation.question_file import evaluate_questions, read_questions
from llava_moslora.evaluation.radar import radar_of, write_radar
from llava_moslora.evaluation.report import comparison, named, write_comparison, write_report
from llava_moslora.evaluation.results import check_comparable, read_results
from llava_moslora.evaluation.scoring import JUDGED
from llava_moslora.inference.load import load
from llava_moslora.runs.checkpoints import model_checkpoint
from llava_moslora.runs.record import RUN
from llava_moslora.training.process_group import is_loopback


def main() -> None:
    args, mode = parse(sys.argv[1:])
    args.batch_size = 16 if args.batch_size is None else args.batch_size
    args.mistakes = PER_BENCHMARK if args.mistakes is None else args.mistakes
    modes = {"benchmark": evaluate_benchmarks, "questions": ask_question_file, "compare": compare_results}
    (modes | {"radar": draw_radar})[mode](args)


def compare_results(args: argparse.Namespace) -> None:
    """Print whether the second result is better than the first, question by question; write it to --output."""
    results = [read_results(folder) for folder in args.run]
    check_comparable(*results)
    text = comparison(args.run, results)
    print(text, end="")
    if args.output is not None:
        output = new_output(args.output)
        below = write_comparison(
            output, text, args.run, results, data=args.data, mistakes=args.mistakes, normalise=args.normalise
        )
        print(below, end="")


def draw_radar(args: argparse.Namespace) -> None:
    """Draw one or several results, and print the picture's values."""
    file = writable(args.radar, "--radar")
    assert file is not None  # the flag is there
    radar = radar_of(named(args.run, [read_results(folder) for folder in args.run]), normalise=args.normalise)
    write_radar(file, radar)
    print(radar.text)


def evaluate_benchmarks(args: argparse.Namespace) -> None:
    """Run unanswered questions, score everything, write and print the results."""
    join_ranks()
    logging.basicConfig(level=logging.WARNING if rank() == 0 else logging.ERROR, format="%(message)s")
    prompts, rules = args.prompts or "prompts-2024", RULES[args.rules or "rules-2024"]
    kit = find_kit(args.kit_python) if args.scorer else None
    wanted, missing = benchmarks_of(args.benchmark, Path(args.data))
    judge = judge_of(args.judge, wanted)
    output, source = new_output(args.output), Path(args.run[0])
    asked = [
        Questions.of(BENCHMARKS[name], open_benchmark(BENCHMARKS[name], args.data), prompts=prompts,
                     batch_size=args.batch_size, limit=args.limit)
        for name in wanted
    ]  # fmt: skip
    with locked(output / f".lock-{rank()}"):
        checkpoint = from_rank_0(model_checkpoint(source) if (source / RUN).is_file() else None)
        header = from_rank_0(source_header(source, checkpoint))
        # One decision for all ranks, before any of them writes.
        done = from_rank_0([complete(questions, header, output / questions.benchmark.name) for questions in asked])
        if not all(done):
            if judge is not None and rank() == 0:
                judge.try_out()
            chat_model = load(source, checkpoint=checkpoint)
            for questions in itertools.compress(asked, [not whole for whole in done]):
                ask(chat_model, questions, header, output / questions.benchmark.name)
        failure = None
        from_all_ranks(None)  # wait until the last answer is written
        if rank() == 0:
            results, failure = scored(output, asked, header, rules, judge)
            missing = [name for name in missing if name not in results]
            tables = {questions.benchmark.name: questions.table for questions in asked}
            text = write_report(
                output, args.run[0], results, tables, missing=missing, paper=args.paper or "", mistakes=args.mistakes
            )
            print(text, end="", flush=True)
            if kit is not None:
                print(f"\n{score_by_kit(kit, output, asked, header)}", end="")
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if failure is not None:
        raise failure


def join_ranks() -> None:
    """Start the process group that torchrun's environment describes; gloo, as only Python values are exchanged."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if is_loopback(os.environ.get("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # A rank waits for the slowest one; torchrun ends it if another one dies.
    distributed.init_process_group("gloo", timeout=timedelta(days=7))


def benchmarks_of(names: list[str], data: Path) -> tuple[list[str], list[str]]:
    """Benchmarks to evaluate; of ``all`` those whose file is there, and the names of the others.

    Raises:
        Refusal: D-FILE, no file of any is there.
    """
    if "all" not in names:
        return names, []
    there = [name for name, benchmark in BENCHMARKS.items() if (data / f"{benchmark.file}.tsv").is_file()]
    if not there:
        raise Refusal(
            "D-FILE", "no benchmark file found", file=data, key="--data",
            expected=", ".join(f"{benchmark.file}.tsv" for benchmark in BENCHMARKS.values()),
            fix="put VLMEvalKit's TSV files there; nothing is downloaded",
        )  # fmt: skip
    return there, [name for name in BENCHMARKS if name not in there]


def judge_of(flag: list[str] | None, wanted: Collection[str]) -> Judge | None:
    """The judge that the flag names.

    Raises:
        Refusal: C-FLAG, nothing of it can be used, or no benchmark needs it; C-KEY.
    """
    if flag is None:
        return None
    if not any(BENCHMARKS[name].kind in JUDGED for name in wanted):
        raise Refusal("C-FLAG", f"has no effect without {' or '.join(JUDGED)}", key="--judge", fix="omit it")
    return Judge.of(*flag)


def ask_question_file(args: argparse.Namespace) -> None:
    """Evaluate a question file and print the accuracy."""
    share = evaluate_questions(
        args.run[0], args.questions, args.image_folder, batch_size=args.batch_size, untrained=args.untrained,
        blank=args.blank, output=args.output, probe=args.probe,
    )  # fmt: skip
    print(f"{share:.1%} of {len(read_questions(args.questions))} questions answered right")


if __name__ == "__main__":
    run_script(main)
