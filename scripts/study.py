"""A study: a recipe × settings × seeds, trained, evaluated and compared; the same command continues a stopped one.

    python scripts/study.py mixer_inits --output_dir runs/mixer-inits          # a ready study, of scripts/studies
    python scripts/study.py STUDY.yaml --output_dir FOLDER --gpus 0 1 2 3      # runs side by side, a GPU each
    python scripts/study.py STUDY.yaml --output_dir FOLDER --report_only       # the table of what is there

Every run is a process of scripts/train_vit_llm.py in its own folder below --output_dir. The same command skips finished
runs and resumes stopped ones. A run that fails is reported, and the others continue. study.json, study.html and
the table in the terminal compare every arm with the baseline, paired by seed. docs/studies.md explains the file.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

from llava_moslora.errors import NOT_OF_THE_PLACE, Refusal, run_script
from llava_moslora.flags import ScriptParser

READY = Path(__file__).parent / "studies"


def ready() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(file.stem for file in READY.glob("*.yaml"))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("study", help=f"the study's YAML file, or a ready one: {', '.join(ready())}")
    parser.add_argument(
        "--output_dir", required=True, metavar="FOLDER", help="where runs, study.json and study.html go"
    )
    parser.add_argument("--gpus", nargs="+", metavar="GPU", help="GPU indices; default: all visible ones")
    parser.add_argument("--gpus_per_run", type=int, metavar="N", help="default: as in the recipe, else 1")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="on a CPU: runs in parallel; default: 1")
    parser.add_argument("--rerun_changed", action="store_true", help="delete and repeat runs whose flags have changed")
    parser.add_argument("--report_only", action="store_true", help="train nothing: report finished runs")
    parser.add_argument("--list", action="store_true", help="show the runs and whether they are done, and stop")
    args = parser.parse_args(argv)
    if args.rerun_changed and (args.report_only or args.list):
        key = f"--rerun_changed, --{'list' if args.list else 'report_only'}"
        raise Refusal("C-FLAG", "one deletes runs to train them again, the other trains nothing", key=key)
    for name in ("gpus_per_run", "parallel"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected="at least 1")
    return args


if __name__ == "__main__":  # --help and a wrong flag are answered here
    run_script(lambda: parse(sys.argv[1:]))

from filelock import FileLock, Timeout

from llava_moslora.evaluation.benchmarks import BENCHMARKS
from llava_moslora.evaluation.commonsense_sets import SETS
from llava_moslora.files.disk import replace_file, replace_json
from llava_moslora.studies import report
from llava_moslora.studies.metrics import check_logged, check_metrics, check_value
from llava_moslora.studies.page import study_page
from llava_moslora.studies.processes import (
    Failure,
    Slot,
    diverged,
    evaluation_command,
    run_all,
    slots_of,
    visible_gpus,
)
from llava_moslora.studies.results import Results, choose, collect
from llava_moslora.studies.runs import (
    Recipe,
    Run,
    check_flags,
    check_unchanged,
    leftovers,
    read_study_recipe,
    runs_of,
    tuned_runs,
    tuning_runs,
)
from llava_moslora.studies.study_file import MEAN, Measure, Study, read_study


def main() -> None:
    args = parse(sys.argv[1:])

    # 1. Read the study, and check the flags of every run, before anything starts
    file = READY / f"{args.study}.yaml" if args.study in ready() else Path(args.study)
    if not file.is_file():
        expected = f"a YAML file, or one of {' | '.join(ready())}"
        raise Refusal("C-PATH", "no such study", file=file, key="STUDY", expected=expected)
    study, output = read_study(file.absolute()), Path(args.output_dir).absolute()
    gpus = tuple(args.gpus) if args.gpus else visible_gpus()
    recipe = read_study_recipe(study, args.gpus_per_run)
    per_run = (args.gpus_per_run or recipe.gpus or 1) if gpus else 0
    slots = slots_of(gpus, per_run, args.parallel)
    first = tuning_runs(study, recipe, output) or runs_of(study, recipe, output)
    for run, settings in check_flags(study, first):
        check_metrics(study, run, settings)
    check_evaluations(study, first[0])

    # 2. Lock its folder, train and compare
    lock = lock_study(output)
    try:
        trains = not (args.report_only or args.list)
        runs = every_run(study, recipe, output)
        changed = check_unchanged(study, runs, per_run if trains else None, rerun=args.rerun_changed)
        for run in changed:
            print(f"{run.name}: deleted, its flags have changed")
        if args.list:
            print("\n".join(f"{'done' if run.done else '    '}  {run.name}" for run in first))
        else:
            results, runs = make(study, recipe, output, slots, per_run, train=not args.report_only)
            write_results(study, recipe, output, results, runs)
    finally:
        lock.release()


def write_results(study: Study, recipe: Recipe, output: Path, results: Results, runs: list[Run]) -> None:
    """Print and write the table, the page and the JSON file.

    Raises:
        Refusal: R-STUDY, afterwards, if a run failed.
    """
    for name in leftovers(output, every_run(study, recipe, output)):
        results.notes.append(f"{name}: a run that is not part of the study; ignored")
    table = report.text(study, results)
    replace_json(output / "study.json", report.as_json(study, runs, results))
    replace_file(output / "study.html", study_page(study, runs, results).encode())
    replace_file(output / "study.txt", f"{table}\n".encode())
    print(f"\n{table}\n\n{output / 'study.html'}", flush=True)
    if failed := [failure for failure in results.failures if not failure.expected]:
        raise Refusal(
            "R-STUDY", "some runs are not complete", file=output, found=f"{len(failed)} failed",
            fix="see above; the same command retries them, except those that diverged",
        )  # fmt: skip


def make(
    study: Study, recipe: Recipe, output: Path, slots: list[Slot], gpus: int, *, train: bool
) -> tuple[Results, list[Run]]:
    """The results, and all runs that they come from; without ``train`` of those that are done."""
    failures: list[Failure] = []

    def trained(runs: list[Run]) -> list[Run]:
        left = [run for run in runs if not run.done]
        print(f"{len(runs)} runs, {len(runs) - len(left)} of them done, {len(slots)} in parallel", flush=True)
        check = partial(check_logged, study, runs)
        failures.extend(run_all(runs, study.measures, slots, gpus, partial(print, flush=True), check))
        return runs

    tuning = tuning_runs(study, recipe, output)
    if tuning and train:
        trained(tuning)
    choices = choose(study, tuning)
    chosen = {(choice.arm, choice.point): choice.best for choice in choices if choice.best}
    runs = tuned_runs(study, recipe, output, chosen) if study.tune else runs_of(study, recipe, output)
    if train and runs:
        trained(runs)
    if not train:
        failures = diverged([*tuning, *runs])
    return collect(study, runs, choices, failures), [*tuning, *runs]


def every_run(study: Study, recipe: Recipe, output: Path) -> list[Run]:
    """Also those that would be made with another value of the tuned flag."""
    if study.tune is None:
        return runs_of(study, recipe, output)
    cells = [(arm.name, point) for arm in study.arms for point in range(len(study.points))]
    with_each = (tuned_runs(study, recipe, output, dict.fromkeys(cells, value)) for value in study.tune.values)
    return [*tuning_runs(study, recipe, output), *(run for runs in with_each for run in runs)]


def check_evaluations(study: Study, run: Run) -> None:
    """Let the scripts that evaluate read their flags, which they do before --help.

    Raises:
        Refusal: the script's, with the study's file and key; C-STUDY, a value that the script will not give.
    """
    for number, measure in enumerate(study.measures):
        if not measure.script:
            continue
        command = [*evaluation_command(run, measure), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=run.start)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Refusal(
                "C-STUDY", f"{measure.script} refuses these flags", file=study.file, key=f"measures[{number}].flags",
                found=said, fix=f"see python scripts/{measure.script} --help",
            )  # fmt: skip
        check_value(study, number, values_of(measure))


def values_of(measure: Measure) -> list[str]:
    """What the measure's script can give: the sets or benchmarks that it is asked for, and their mean."""
    names = SETS if measure.script == "evaluate_commonsense.py" else BENCHMARKS
    asked = dict(measure.flags).get("sets" if names is SETS else "benchmark", ())
    asked = tuple(name for word in asked for name in word.split(",") if name)
    return [*(names if not asked or "all" in asked else asked), MEAN]


def lock_study(output: Path) -> FileLock:
    """The lock of the study's folder, held.

    Raises:
        Refusal: C-OUTPUT, the folder cannot be made; C-LOCKED, another process works on the study.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock")
        lock.acquire(timeout=1)
        return lock
    except Timeout as error:
        fix = "wait for it, stop it, or choose another --output_dir"
        raise Refusal("C-LOCKED", "another process works on this study", file=output, fix=fix) from error
    except OSError as error:
        if error.errno in NOT_OF_THE_PLACE:
            raise
        raise Refusal("C-OUTPUT", "cannot be made", file=output, key="--output_dir", found=error) from error


if __name__ == "__main__":
    run_script(main)
