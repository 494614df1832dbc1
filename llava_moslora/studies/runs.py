"""The runs of a study: their flags, checked by training's own parser before any of them starts, and their folders.

A run's folder contains ``run/`` (the ``--output_dir`` of the training), ``log.txt``, ``asked.json`` (the run's
definition, written before it starts), ``done.json`` after success, or ``diverged.json`` if its loss was not finite,
which is deterministic; and a folder for every evaluation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings
from llava_moslora.errors import Refusal, few
from llava_moslora.files.disk import delete, read_json, replace_json
from llava_moslora.files.manifest import sha256
from llava_moslora.planning.recipe import read_recipe
from llava_moslora.studies.study_file import Flags, Measure, Study, label, slug
from llava_moslora.training.command_line import early, parse

ASKED, DONE, DIVERGED, LOG, RUN = "asked.json", "done.json", "diverged.json", "log.txt", "run"
RUNS = "runs"  # below the study's --output_dir
Settings = tuple[ModelSettings, DataSettings, AdapterSettings, dict[str, Any]]  # the last: training, by name


@dataclass(frozen=True)
class Recipe:
    """The flags that all runs share, GPUs per run if the recipe says so, and the working directory."""

    flags: tuple[str, ...]
    gpus: int | None
    folder: Path


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Attributes:
        name: of its folder, below the study's.
        point: its position in the study's points.
        tuned: the value of the tuned flag; "" where nothing is tuned.
        tuning: whether it only serves to choose that value.
        words: the complete command line of the training.
        start: the folder it is started in, which relative paths in ``words`` start from.
    """

    name: str
    arm: str
    point: int
    seed: int
    tuned: str
    tuning: bool
    folder: Path
    words: tuple[str, ...]
    start: Path

    @property
    def output(self) -> Path:
        """The training's run folder."""
        return self.folder / RUN

    @property
    def done(self) -> bool:
        return (self.folder / DONE).is_file()

    @property
    def diverged(self) -> bool:
        return (self.folder / DIVERGED).is_file()

    def asked(self, gpus: int) -> dict[str, Any]:
        """What the run's result depends on: its flags, files of flags among them, and the number of GPUs (0: a CPU)."""
        given = early(self.words)
        files = [str(file) for file in (given.config, given.deepspeed) if file]
        digests = {file: sha256(self.start / file) for file in files if (self.start / file).is_file()}
        flags = _as_flags(self.words)
        del flags["--output_dir"]  # the study's folder may have moved
        return {"flags": flags, "files": digests, "gpus": gpus}


def _as_flags(words: Sequence[str]) -> dict[str, list[str]]:
    """Flag → its values; of a flag that is given twice the last ones, as the parser takes them."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            last = flags[name.replace("-", "_").replace("__", "--", 1)] = [value] if equals else []
        else:
            last.append(word)
    return flags


def read_study_recipe(study: Study, gpus: int | None) -> Recipe:
    """
    Args:
        gpus: of a run; None: as the recipe says.

    Raises:
        Refusal: C-RECIPE, as :func:`llava_moslora.planning.recipe.read_recipe`.
    """
    if isinstance(study.recipe, tuple):
        return Recipe(study.recipe, None, Path.cwd())
    call = read_recipe(study.recipe, gpus)
    return Recipe(tuple(call.flags), call.gpus, call.folder)


def runs_of(study: Study, recipe: Recipe, output: Path) -> list[Run]:
    """Those of the result, in the order in which they start: all arms with a seed before the next seed. With tuning
    they depend on it: :func:`tuning_runs` first, then :func:`tuned_runs`."""
    return [
        _run(study, recipe, output, arm, point, seed)
        for seed in study.seeds
        for point in range(len(study.points))
        for arm in range(len(study.arms))
    ]


def tuning_runs(study: Study, recipe: Recipe, output: Path) -> list[Run]:
    """Those that the tuned flag's values are chosen by."""
    if study.tune is None:
        return []
    return [
        _run(study, recipe, output, arm, point, seed, value, True)
        for seed in study.tune.seeds
        for value in study.tune.values
        for point in range(len(study.points))
        for arm in range(len(study.arms))
    ]


def tuned_runs(study: Study, recipe: Recipe, output: Path, chosen: dict[tuple[str, int], str]) -> list[Run]:
    """Those of the result with the ``chosen`` value of each arm and point; of the others there are none."""
    return [
        _run(study, recipe, output, number, point, seed, chosen[arm.name, point])
        for seed in study.seeds
        for point in range(len(study.points))
        for number, arm in enumerate(study.arms)
        if (arm.name, point) in chosen
    ]


def _run(
    study: Study, recipe: Recipe, output: Path, arm: int, point: int, seed: int, tuned: str = "", tuning: bool = False
) -> Run:
    own, place = study.arms[arm], study.points[point]
    flags: Flags = study.flags | own.flags | place
    parts = [slug(own.name), *([slug(label(place))] if place else [])]
    if study.tune is not None:
        flags = flags | {study.tune.flag: (tuned,)}
        parts.append(slug(f"{study.tune.flag}={tuned}"))
    name = "/".join([*parts, f"seed-{seed}"])
    folder = output / RUNS / name
    ours = {"seed": (str(seed),), "resume": ("True",), "output_dir": (str(folder / RUN),)}
    words = [word for flag, values in (flags | ours).items() for word in (f"--{flag}", *values)]
    return Run(name, own.name, point, seed, tuned, tuning, folder, (*recipe.flags, *words), recipe.folder)


def check_flags(study: Study, runs: Iterable[Run]) -> list[tuple[Run, Settings]]:
    """Parse every run's command line as the training would, once for all seeds; those runs with their settings.

    Raises:
        Refusal: the parser's, with the study's file and the key that the flag comes from.
    """
    seen, settings = set(), []
    for run in runs:
        if (key := (run.arm, run.point, run.tuned)) in seen:
            continue
        seen.add(key)
        try:
            with _started_in(run.start):
                settings.append((run, parse(run.words)))
        except Refusal as refusal:
            where = _origin(study, run, refusal.key or "")
            also = f"{refusal.file}: " if refusal.file is not None else ""
            raise Refusal(
                refusal.code, f"{also}{refusal.key or ''}: {refusal.what}".lstrip(": "), file=study.file, key=where,
                found=refusal.found, expected=refusal.expected, fix=refusal.fix,
            ) from refusal  # fmt: skip
    return settings


@contextmanager
def _started_in(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def _origin(study: Study, run: Run, flag: str) -> str:
    """The key of the study that sets ``flag`` in a run, the last one that does."""
    number = next(k for k, arm in enumerate(study.arms) if arm.name == run.arm)
    places: list[tuple[str, Iterable[str]]] = [
        ("tune", [study.tune.flag] if study.tune else []), (f"points[{run.point}]", study.points[run.point]),
        (f"arms[{number}].flags", study.arms[number].flags), ("flags", study.flags),
    ]  # fmt: skip
    named = [name.strip().lstrip("-") for name in flag.replace("/", ",").split(",")]
    for place, flags in places:
        for name in named:
            if name in flags:
                return f"{place}.{name}"
    return "recipe"


def check_unchanged(study: Study, runs: Sequence[Run], gpus: int | None, *, rerun: bool) -> list[Run]:
    """The runs that were made with other settings than the study's current ones; with ``rerun`` they are deleted.

    Args:
        gpus: of a run; None where nothing is trained, so that a report can be made on a machine with others.

    Raises:
        Refusal: C-CHANGED, there are some, without ``rerun``: results of two studies are never mixed.
    """
    changed = [(run, difference) for run in runs if (difference := _difference(run, gpus))]
    if changed and not rerun:
        run, (then, now) = changed[0]
        raise Refusal(
            "C-CHANGED", f"{len(changed)} runs were made with settings other than the study's", file=study.file,
            key=few(one.name for one, _ in changed), found=now, expected=f"as in {run.folder / ASKED}: {then}",
            fix="--rerun_changed deletes and repeats just these, or another --output_dir keeps them",
        )  # fmt: skip
    for run, _ in changed:
        delete(run.folder)
    return [run for run, _ in changed]


def _difference(run: Run, gpus: int | None) -> tuple[str, str] | None:
    """What differs from the settings that the run was made with, then and now; None if nothing does."""
    if not (run.folder / ASKED).is_file():
        return None
    then = read_json(run.folder / ASKED)
    now = run.asked(then.get("gpus", 0) if gpus is None else gpus)
    if then == now:
        return None
    flat = [{**{k: v for k, v in side.items() if k != "flags"}, **side.get("flags", {})} for side in (then, now)]
    names = [name for name in flat[0] | flat[1] if flat[0].get(name) != flat[1].get(name)]
    old, new = ("; ".join(f"{name} {_shown(side.get(name))}" for name in names) for side in flat)
    return old, new


def _shown(value: object) -> str:
    return "not given" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def write_asked(run: Run, gpus: int) -> None:
    """Write a run's definition before it starts."""
    run.folder.mkdir(parents=True, exist_ok=True)
    replace_json(run.folder / ASKED, run.asked(gpus))


def evaluation_folder(run: Run, measure: Measure) -> Path:
    """The name depends on the flags, so that answers of different evaluations are never mixed."""
    asked = repr((measure.script, measure.flags, measure.value)).encode()
    return run.folder / f"evaluation-{slug(measure.name)}-{hashlib.sha256(asked).hexdigest()[:8]}"


def leftovers(output: Path, runs: Iterator[Run] | Sequence[Run]) -> list[str]:
    """Folders of runs that are not (or no longer) part of the study, by name."""
    asked = {run.folder for run in runs}
    found = (Path(folder) for folder, _, files in os.walk(output / RUNS) if ASKED in files)
    return sorted(path.relative_to(output / RUNS).as_posix() for path in found if path not in asked)
