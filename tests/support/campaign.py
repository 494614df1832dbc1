"""Kills a training run repeatedly, resumes it, and compares it with an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llava_moslora.files.disk import replace_json
from llava_moslora.files.manifest import sha256
from llava_moslora.runs.checkpoints import newest_valid
from support.launching import ROOT, flags
from support.warm_server import Launch, WarmServer
from support.zero_runs import configuration

STEPS, BATCH, ACCUMULATION, RECORDS = 24, 4, 2, 24  # 6 steps an epoch: 4 epochs
LIMIT = 900  # seconds after which a launch counts as stuck; one takes a few, on a loaded machine minutes
STATE = ("adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json")


@dataclass
class Tally:
    """What a campaign found; the field names are those of the printed figure line."""

    name: str
    kills: int = 0
    runs: int = 0
    points_used: int = 0  # of the points to die at, when they are chosen
    resumes_ok: int = 0
    stuck: int = 0
    divergent_steps: int = 0
    compared_steps: int = 0
    final_sha: str = "equal"
    lost_steps: list[int] = field(default_factory=list)
    resume_s: list[float] = field(default_factory=list)
    survivors_exit_max_s: float = 0.0
    instants_without_valid_checkpoint: int = 0
    survivors_untyped: int = 0  # that did not print one line about the lost contact
    dead_named: int = 0  # of the survivors that printed it, those that named the dead rank
    survivors: int = 0
    stale_staging_left: int = 0
    samples_missing: int = 0
    samples_repeated: int = 0
    curves: list[dict] = field(default_factory=list)  # of the run with most launches: losses per launch, for the plot
    trouble: str = ""  # the last output of the first launch that failed without being killed

    @property
    def clean(self) -> bool:
        bad = self.stuck + self.divergent_steps + self.samples_missing + self.samples_repeated
        bad += self.instants_without_valid_checkpoint + self.stale_staging_left + self.survivors_untyped
        return bad == 0 and self.resumes_ok == self.kills and self.final_sha == "equal"

    def line(self) -> str:
        lost, resume = self.lost_steps or [0], sorted(self.resume_s or [0.0])
        return (
            f"{self.name}: kills={self.kills} resumes_ok={self.resumes_ok} stuck={self.stuck} "
            f"divergent_steps={self.divergent_steps}/{self.compared_steps} final_sha={self.final_sha} "
            f"lost_steps_mean={statistics.mean(lost):.1f} max={max(lost)} "
            f"resume_s_p50={resume[len(resume) // 2]:.1f} p95={resume[int(len(resume) * 0.95)]:.1f} "
            f"survivors_exit_max_s={self.survivors_exit_max_s:.1f} survivors_untyped={self.survivors_untyped} "
            f"dead_named={self.dead_named}/{self.survivors} "
            f"no_valid_checkpoint={self.instants_without_valid_checkpoint} "
            f"stale_staging_left={self.stale_staging_left} "
            f"samples_missing={self.samples_missing} samples_repeated={self.samples_repeated}"
        )


class Campaign:
    """Kills under one way of training.

    Args:
        name: shown in the figures.
        warm_server: starts the training command.
        parts: tiny parts with ``RECORDS`` records.
        folder: where the runs go.
        world: ranks; 0 is a process without a launcher.
        zero: a file of zero_configs/ without ``zero``, such as ``2_offload``, or None.
        changes: flags that differ, by name.
        tally: of earlier calls, to go on with.
        main: None for ours, or ``MODULE:FUNCTION`` of another trainer, whose checkpoints are not opened.
        mutant: a function of ``mutants.py`` that breaks ours.
    """

    def __init__(
        self,
        name: str,
        warm_server: WarmServer,
        parts,
        folder: Path,
        *,
        world: int = 0,
        zero: int | str | None = None,
        changes: dict | None = None,
        main: str | None = None,
        mutant: str | None = None,
        tally: Tally | None = None,
    ):
        self.warm_server, self.parts, self.folder, self.world, self.main = warm_server, parts, folder, world, main
        self.changes = changes or {}
        self.hooks = [[f"support.mutants:{mutant}", {}]] if mutant else []
        self.tally = tally or Tally(name)
        self.ranks = max(world, 1)
        folder.mkdir(parents=True, exist_ok=True)
        self.config = None if zero is None else configuration(f"zero{zero}", folder)
        self.uninterrupted = self.launch("uninterrupted", 0)
        assert self.uninterrupted.succeeded, self.uninterrupted.printed()[-3000:]
        self.seconds = self.uninterrupted.seconds  # of the fastest whole launch: the first imports more than others
        self.expected = steps_of([self.uninterrupted])
        self.final = self.state_of(folder / "uninterrupted")
        self._account([self.uninterrupted])

    def arguments(self, run: Path) -> list[str]:
        same = {
            "deepspeed": self.config,
            "per_device_train_batch_size": BATCH // ACCUMULATION // self.ranks,
            "gradient_accumulation_steps": ACCUMULATION,
            "lora_dropout": 0.1,
            "max_steps": STEPS,
            "save_steps": 2,
            "save_total_limit": 2,
            "report_to": "none",
            "resume": True,
            "data_cache": self.folder / "cache",
            "dataloader_num_workers": 0,
        }
        return flags(self.parts, run, **(same | self.changes))

    def launch(self, run: str, number: int, hooks: list | None = None, **kill) -> Launch:
        how = kill | ({"main": self.main} if self.main else {})
        return self.warm_server.launch(
            self.arguments(self.folder / run),
            self.folder / f"{run}-launch{number}",
            world=self.world,
            hooks=self.hooks + (hooks or []),
            limit=LIMIT,
            **how,
        )

    def state_of(self, run: Path) -> list[str]:
        last = run / f"checkpoint-{STEPS}"
        if self.main:
            return [sha256(last / "adapter_model.safetensors")]
        ranks = [f"random-{rank}.json" for rank in range(self.ranks)]
        return [sha256(last / name) for name in (*STATE, *ranks)]

    def run(
        self,
        kills: int,
        seed: int,
        per_run: int = 5,
        points: Sequence[list] = (),
        keep: Callable[[Tally], object] = lambda _: None,
    ) -> Tally:
        """Runs with up to ``per_run`` kills each, resumed to their end, until there were ``kills`` of all calls.

        Args:
            points: instead of random times, hooks that die at a chosen point, one after another, again and again.
            keep: called with the tally after each run.

        A run that is stuck is given up; ours ends the campaign then.
        """
        while self.tally.kills < kills and not (self.tally.stuck and not self.main):
            number = self.tally.runs
            chance = random.Random(f"{seed} {self.tally.name} {number}")
            self._one_run(f"run{number}", min(per_run, kills - self.tally.kills), chance, points)
            self.tally.runs += 1
            keep(self.tally)
        return self.tally

    def _one_run(self, run: str, kills: int, chance: random.Random, points: Sequence[list]) -> None:
        tally, launches, failures = self.tally, [], 0
        while True:
            kill = {}
            if kills > 0 and points:
                kill = {"hooks": [points[tally.points_used % len(points)]]}
                tally.points_used += 1
            elif kills > 0:
                kill = {"kill": chance.uniform(0.05, self.seconds)}
                if self.ranks > 1 and chance.random() < 0.5:
                    kill["ranks"] = [chance.randrange(self.ranks)]
            launch = self.launch(run, len(launches), **kill)
            launches.append(launch)
            if launch.succeeded:
                if len(launches) == 1:
                    self.seconds = min(self.seconds, launch.seconds)
                break
            if -9 in launch.status and not launch.stuck:
                kills -= 1
                tally.kills += 1
                tally.survivors_exit_max_s = max(tally.survivors_exit_max_s, launch.survived if self.ranks > 1 else 0)
                for rank, status in enumerate(launch.status):  # 0: it was at its end already
                    untyped = status not in (-9, 0) and "error[P-RANK]" not in launch.printed(rank)
                    tally.survivors_untyped += untyped and not self.main
                    if "lost contact" in launch.printed(rank):
                        tally.survivors += 1
                        tally.dead_named += (
                            re.search(r"lost contact.*rank \d+ \(process \d+ on", launch.printed(rank)) is not None
                        )
                self._look_for_valid(self.folder / run, launches)
                continue
            failures += 1
            tally.trouble = tally.trouble or launch.printed()[-1500:].replace(f"{ROOT}/", "").replace(
                f"{sys.prefix}/", ""
            )
            if failures == 2:  # failed twice in a row: it will not recover by itself
                tally.stuck += 1
                return
        self._compare(run, launches)

    def _look_for_valid(self, run: Path, launches: list[Launch]) -> None:
        """Once a checkpoint has been published, a valid one must be there at every instant."""
        if self.main:
            return
        published = any(row["step"] > 2 for launch in launches for row in launch.micro_batches())
        if published and newest_valid(run)[0] is None:
            self.tally.instants_without_valid_checkpoint += 1

    def _compare(self, run: str, launches: list[Launch]) -> None:
        tally = self.tally
        for before, after in itertools.pairwise(launches):
            steps, first = [row["step"] for row in before.micro_batches()], after.micro_batches()[:1]
            tally.resumes_ok += -9 in before.status
            if steps and first:
                tally.lost_steps.append(max(0, max(steps) - first[0]["step"] + 1))
            if first:
                tally.resume_s.append(first[0]["time"] - after.began)
        found = steps_of(launches)
        tally.compared_steps += len(self.expected)
        tally.divergent_steps += sum(found.get(step) != rows for step, rows in self.expected.items())
        if self.state_of(self.folder / run) != self.final:
            tally.final_sha = "different"
        tally.stale_staging_left += len(
            [*(self.folder / run).glob(".*.staging"), *(self.folder / run).glob(".*.trash")]
        )
        self._account(launches)
        curves = [curve(launch) for launch in [self.uninterrupted, *launches] if launch.micro_batches()]
        if len(curves) > len(tally.curves):
            tally.curves = curves

    def _account(self, launches: list[Launch]) -> None:
        """Every record exactly once an epoch, over all launches."""
        per_epoch = RECORDS // BATCH
        steps = steps_of(launches)
        for epoch in range(STEPS // per_epoch):
            rows = [steps.get(step, ()) for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)]
            seen = [record for row in rows for _, records, _ in row for record in records]
            self.tally.samples_missing += len(set(range(RECORDS)) - set(seen))
            self.tally.samples_repeated += len(seen) - len(set(seen))


def curve(launch: Launch) -> dict:
    """The losses of a launch, and how many optimizer steps were done at each."""
    rows, seen = launch.micro_batches(), Counter()
    steps = []
    for row in rows:
        seen[row["step"]] += 1
        steps.append(row["step"] - 1 + seen[row["step"]] / ACCUMULATION)
    return {"steps": steps, "losses": [float.fromhex(row["loss"]) for row in rows]}


def steps_of(launches: list[Launch]) -> dict[int, tuple]:
    """Step → its micro-batches as (rank, records, loss bits); of a step that was computed twice, the last time."""
    steps: dict[int, tuple] = {}
    for launch in launches:
        mine: dict[int, list] = {}
        for rank in range(launch.world):
            for row in launch.micro_batches(rank):
                mine.setdefault(row["step"], []).append((rank, tuple(row["records"]), row["loss"]))
        steps |= {step: tuple(sorted(rows)) for step, rows in mine.items()}
    return steps


class Record:
    """The tallies of campaigns in a JSON file, so that a later call goes on; without a file nothing is kept."""

    def __init__(self, file: Path | None, facts: dict):
        stored = json.loads(file.read_text()) if file is not None and file.is_file() else {}
        rows = [Tally(**row) for row in stored.pop("rows", [])]
        self.file, self.facts = file, stored | facts
        self.tallies = {tally.name: tally for tally in rows}

    def keep(self, tally: Tally) -> None:
        self.tallies[tally.name] = tally
        if self.file is None:
            return
        rows = list(self.tallies.values())
        ours = [row for row in rows if not row.name.startswith("stock")]
        total = {"kills": sum(row.kills for row in ours), "resumes_ok": sum(row.resumes_ok for row in ours)}
        total |= {"clean": all(row.clean for row in ours)}
        lines = [row.line() for row in rows]
        content = self.facts | {"total": total, "lines": lines, "rows": [asdict(row) | {"curves": []} for row in rows]}
        replace_json(self.file, content)
