"""Does the mixer help? LoRA, MoSLoRA and its controls on two small real tasks, the learning rate tuned for each.

    bash playground/demo_inputs.sh && python benchmarks/mixer.py

Folded, a trained MoSLoRA is a LoRA of the same rank (A' = W·A): it can be no better than the LoRA with these weights.
Whatever it gains or loses comes from how it trains. This is the instrument for that question; it was written down
before its results were seen, and says whatever comes out.

Arms, all of rank 8, alpha 16, the same A at the same seed, B = 0:

    lora                 stock PEFT's LoraConfig
    moslora_kaiming      MosLoraConfig, W from kaiming_uniform, trained
    moslora_orthogonal   MosLoraConfig, W orthogonal, trained
    frozen_kaiming       MosLoraConfig, W from kaiming_uniform, frozen: the init only
    folded_kaiming       the same W multiplied into A at the start, then stock PEFT's LoraConfig: the init only
    two_subspaces        MosLoraConfig, the frozen butterfly: two-subspaces-mixing (paper, eq. 6 and Table 1)

Tasks (mixer_tasks.py): images, the demo's CLIP tower on strange EasyVQA images, 24 classes; text, SmolLM2-135M, first
lines of the standard library's docstrings → module.

Protocol:

- Steps, batch size, schedule and the order of the examples are the same for all arms at a seed. Only the adapters'
  learning rate is the arm's own.
- The rate is tuned for each arm on seeds that are not used again and on validation examples that are not tested on: a
  grid of factor 2, made longer while the best mean loss is at its edge; the lowest mean validation loss wins.
- Then 20 seeds (images) and 5 (text) at that rate, measured on the test examples. The numbers of seeds are fixed here.
- What counts is the test loss: its difference to LoRA's, seed by seed; the mean with its 95 % t-interval; p-values of
  the paired t-test, corrected over a task's five comparisons by Holm's method. Where the corrected p is below 0.05 the
  arm is called better or worse, else "no difference above X was seen", X the interval's farther end.

For scale, LoRA is also measured at its second-best rate, on the same seeds. This was added after the results above had
been seen, and is not one of the comparisons.

Every finished run is a line in ``--work``/runs.jsonl. After a kill the same command goes on, and ends in the same
numbers. Written: benchmarks/results/mixer.json and mixer.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores, and sums are formed in one order
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import peft
import torch
import transformers
from mixer_plot import draw
from mixer_report import BASELINE, report_of, table
from mixer_tasks import ROOT, Images, Task, Text
from mixer_train import ALPHA, ARMS, HEAD_RATE, RANK, Run, train

from llava_moslora.errors import Refusal, run_script

SOURCES = ("mixer_tasks.py", "mixer_train.py")  # what decides a run's result, beside its plan


@dataclass(frozen=True)
class Plan:
    """Sizes of a task, fixed from the time that a run takes, before any comparison."""

    steps: int
    batch: int
    rates: tuple[float, ...]  # the grid before it is made longer
    tuning_seeds: tuple[int, ...]
    seeds: tuple[int, ...]

    longest = 10  # rates in a grid

    @property
    def factor(self) -> float:
        return self.rates[1] / self.rates[0]


PLANS = {
    "images": Plan(100, 32, (1.6e-3, 3.2e-3, 6.4e-3, 12.8e-3), tuple(range(100, 103)), tuple(range(20))),
    "text": Plan(50, 16, (1e-3, 2e-3, 4e-3, 8e-3), tuple(range(100, 102)), tuple(range(5))),
}


class Runner:
    """Runs what has no result yet, several at a time, and keeps every result.

    Args:
        tasks: name → task, opened.
        folders: what :func:`open_tasks` takes, for other processes.
        file: a JSON line for each finished run; its lines of other plans, code, data or versions do not count.
        workers: processes; 0: in this one.
    """

    def __init__(
        self, tasks: dict[str, Task], plans: dict[str, Plan], file: Path, folders: dict[str, Path], workers: int
    ):
        self.tasks, self.plans, self.file, self.folders, self.workers = tasks, plans, file, folders, workers
        self.keys = {name: fingerprint(plan, tasks[name].digest) for name, plan in plans.items()}
        self.results = dict(self._kept())
        self.read = len(self.results)  # how many were there
        self._pool: ProcessPoolExecutor | None = None

    def _kept(self) -> Iterator[tuple[Run, dict]]:
        if not self.file.is_file():
            return
        text = self.file.read_bytes()
        if not text.endswith(b"\n"):  # a kill cut the last line off: its run is done again
            os.truncate(self.file, text.rfind(b"\n") + 1)
        for line in text.decode().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue
            kept = json.loads(line)
            run = Run(**kept["run"])
            if kept["key"] == self.keys.get(run.task):
                yield run, kept["result"]

    @contextmanager
    def processes(self) -> Iterator[None]:
        if not self.workers:
            yield
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, start_worker, (self.folders, tuple(self.plans))) as self._pool:
            yield

    def run(self, runs: Iterable[Run]) -> list[dict]:
        """The results of ``runs``, in their order."""
        runs = list(runs)
        missing = [run for run in runs if run not in self.results]
        for number, (run, result) in enumerate(self._finished(missing), start=1):
            line = json.dumps({"key": self.keys[run.task], "run": asdict(run), "result": result})
            with open(self.file, "ab") as stream:
                stream.write(f"{line}\n".encode())
                stream.flush()
                os.fsync(stream.fileno())
            self.results[run] = result
            what = f"{run.task} {run.arm} rate {run.rate:g} seed {run.seed}"
            print(f"  {number}/{len(missing)}  {what}: {run.part} loss {result['loss']}", flush=True)
        return [self.results[run] for run in runs]

    def _finished(self, runs: Sequence[Run]) -> Iterator[tuple[Run, dict]]:
        if self._pool is None:
            for run in runs:
                plan = self.plans[run.task]
                yield run, train(self.tasks[run.task], run, plan.steps, plan.batch)
            return
        waiting = {self._pool.submit(train_in_worker, run, self.plans[run.task]): run for run in runs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def fingerprint(plan: Plan, data: str) -> str:
    """Of all that decides a result: plan without grid and seeds, which are in each run, data, code, versions."""
    text = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in SOURCES]
    text += [str((plan.steps, plan.batch)), data, platform.python_version(), torch.__version__]
    return hashlib.sha256("\0".join([*text, transformers.__version__, peft.__version__]).encode()).hexdigest()[:16]


def open_tasks(folders: dict[str, Path], names: Iterable[str]) -> dict[str, Task]:
    made = {
        "images": lambda: Images(folders["images"], folders["tower"]),
        "text": lambda: Text(folders["llm"], folders["work"]),
    }
    return {name: made[name]() for name in names}


_WORKER: dict[str, Task] = {}


def start_worker(folders: dict[str, Path], names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    _WORKER.update(open_tasks(folders, names))


def train_in_worker(run: Run, plan: Plan) -> dict:
    return train(_WORKER[run.task], run, plan.steps, plan.batch)


def tune(runner: Runner, task: str) -> dict[str, dict[float, list[dict]]]:
    """Arm → rate → a result for each tuning seed; the arm's best rate has a neighbour on both sides."""
    plan = runner.plans[task]
    rates = {arm: list(plan.rates) for arm in ARMS}
    while True:
        keys = [(arm, rate) for arm in ARMS for rate in rates[arm]]
        runs = [Run(task, arm, rate, seed, "validation") for arm, rate in keys for seed in plan.tuning_seeds]
        results = iter(runner.run(runs))
        curves: dict[str, dict[float, list[dict]]] = {arm: {} for arm in ARMS}
        for arm, rate in keys:
            curves[arm][rate] = [next(results) for _ in plan.tuning_seeds]
        longer = False
        for arm, curve in curves.items():
            best = best_rate(curve)
            if len(curve) < plan.longest and best in (min(curve), max(curve)):
                rates[arm].append(best / plan.factor if best == min(curve) else best * plan.factor)
                rates[arm].sort()
                longer = True
        if not longer:
            return curves


def mean_loss(results: Sequence[dict]) -> float:
    """Infinite where one run's loss was not finite."""
    return sum(float("inf") if r["loss"] is None else r["loss"] for r in results) / len(results)


def best_rate(curve: dict[float, list[dict]]) -> float:
    return min(curve, key=lambda rate: mean_loss(curve[rate]))


def second_rate(curve: dict[float, list[dict]]) -> float:
    return sorted(curve, key=lambda rate: mean_loss(curve[rate]))[1]


def study(runner: Runner) -> dict[str, dict]:
    """Task → arm → the whole curve, the chosen rate, and a result for each seed."""
    found = {}
    with runner.processes():
        for task, plan in runner.plans.items():
            curves = tune(runner, task)
            chosen = {arm: best_rate(curve) for arm, curve in curves.items()}
            runs = [Run(task, arm, chosen[arm], seed, "test") for seed in plan.seeds for arm in ARMS]
            results = dict(zip(runs, runner.run(runs), strict=True))
            found[task] = {
                arm: {
                    "curve": [{"rate": rate, "results": curves[arm][rate]} for rate in sorted(curves[arm])],
                    "rate": chosen[arm],
                    "results": [results[Run(task, arm, chosen[arm], seed, "test")] for seed in plan.seeds],
                }
                for arm in ARMS
            }
            second = second_rate(curves[BASELINE])
            again = runner.run([Run(task, BASELINE, second, seed, "test") for seed in plan.seeds])
            found[task][BASELINE] |= {"second_rate": second, "second_results": again}
    return found


def add_session(file: Path, seconds: float) -> list[float]:
    """Wall time of every session that came to its end, this one last: a study that went on has several."""
    sessions = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    sessions.append(round(seconds, 1))
    file.write_text(json.dumps(sessions), encoding="utf-8")
    return sessions


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor() or platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "playground/data/easy_vqa", help="EasyVQA")
    parser.add_argument("--llm", type=Path, default=ROOT / "playground/models/smollm2-135m-instruct", help="SmolLM2")
    parser.add_argument("--work", type=Path, default=ROOT / "playground/runs/mixer", help="results of single runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of the two files")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.processes < 1:
        raise Refusal("C-FLAG", "out of range", key="--processes", found=args.processes, expected="at least 1")
    start = time.perf_counter()
    args.work.mkdir(parents=True, exist_ok=True)
    folders = {"images": args.data, "tower": ROOT / "playground/clip-tiny", "llm": args.llm, "work": args.work}
    torch.set_num_threads(2)  # whatever --processes says: what enters the LLM's top layers is computed here
    runner = Runner(open_tasks(folders, PLANS), PLANS, args.work / "runs.jsonl", folders, args.processes)
    found = study(runner)
    seconds = add_session(args.work / "seconds.json", time.perf_counter() - start)
    result = {
        "what": "test loss of each arm minus LoRA's, by seed", "rank": RANK, "alpha": ALPHA, "head_rate": HEAD_RATE,
        "plans": {name: asdict(plan) for name, plan in PLANS.items()},
        "examples": {name: task.sizes for name, task in runner.tasks.items()},
        "machine": machine(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "peft": peft.__version__, "processes": args.processes,
        "wall_seconds": round(sum(seconds), 1), "sessions_seconds": seconds, "runs": len(runner.results),
        "cpu_seconds_of_runs": round(sum(one["cpu_seconds"] for one in runner.results.values())),
        "tasks": {name: report_of(arms, PLANS[name].seeds) for name, arms in found.items()},
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "mixer.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result["tasks"], args.output / "mixer.png")
    print(table(result))


if __name__ == "__main__":
    run_script(main)
