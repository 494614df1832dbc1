"""Strict parsing of a study file: a recipe × arms × points × seeds, and measures.

::

    recipe: ../llama3_8b_commonsense.sh     # or a list of flags of scripts/train_vit_llm.py
    flags: {eval_strategy: epoch}                   # over the recipe, in every run
    seeds: [1, 2, 3]
    arms:                                           # the first is the baseline, unless `baseline` names another
      - {name: LoRA, flags: {mixer_init: identity, train_mixer: False}, paper: [82.8]}
      - {name: MoSLoRA, flags: {}}
    points: [{lora_r: 16}, {lora_r: 32}]            # optional: every arm at each of these
    tune: {flag: learning_rate, values: [1e-4, 2e-4], seeds: [101, 102]}    # optional: per arm and point
    measures:
      - {name: validation loss, metric: eval_loss, better: lower}

``${NAME:-TEXT}`` in a value is the environment's NAME, or TEXT where it is not set, as in a shell recipe.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from llava_moslora.errors import Refusal, did_you_mean
from llava_moslora.training.config_file import read_texts

Flags = dict[str, tuple[str, ...]]  # flag without dashes → its words

# Flags that the study itself gives to every run.
OWN = {
    "seed": "it is one of the study's seeds",
    "output_dir": "every run has its own folder in --output_dir of the study",
    "resume": "every run is resumed where it was stopped",
    "overwrite": "--rerun_changed of the study repeats what has changed",
    "allow_change": "--rerun_changed of the study repeats what has changed",
    "config": "give the file's flags here, or as the recipe: [--config, FILE]",
}
SCRIPTS = ("evaluate.py", "evaluate_commonsense.py")
BETTER, AT = ("lower", "higher"), ("last", "best")
MEAN = "mean"
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Arm:
    """One of the settings that are compared; ``paper``: its published values, one for each point, or none."""

    name: str
    flags: Flags
    paper: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tuning:
    """A flag whose value is chosen for every arm and point, on seeds that the result does not use."""

    flag: str
    values: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Measure:
    """A number of a finished run.

    Attributes:
        metric: a key of the run's ``metrics.jsonl``; "" where a script measures.
        at: the metric's ``last`` value, or the ``best`` one.
        script: of :data:`SCRIPTS`, called with the run and ``flags``; "" for a metric.
        value: of the script's results: a set's or a benchmark's name, or :data:`MEAN`.
    """

    name: str
    better: str
    metric: str = ""
    at: str = "last"
    script: str = ""
    flags: tuple[tuple[str, tuple[str, ...]], ...] = ()
    value: str = MEAN

    @property
    def digits(self) -> int:
        """Decimals that are shown: of a loss or share four, of percent two."""
        return 4 if self.metric else 2


@dataclass(frozen=True)
class Study:
    """A study as its file asks for it; ``points`` has one without flags where the file has none."""

    file: Path
    about: str
    recipe: Path | tuple[str, ...]
    flags: Flags
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    baseline: str
    points: tuple[Flags, ...]
    tune: Tuning | None
    measures: tuple[Measure, ...]

    @property
    def name(self) -> str:
        return self.file.stem


def label(point: Flags) -> str:
    """A point for people, and in the names of folders; "" without flags."""
    return ", ".join(f"{flag}={' '.join(words)}" for flag, words in point.items())


def slug(text: str) -> str:
    """``text`` as a part of a file name."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("._") or "_"


def read_study(path: Path) -> Study:
    """
    Raises:
        Refusal: C-PATH, C-PARSE, it cannot be read; C-STUDY, with the key at fault: unknown or missing, of another
            type, twice what must be once, or a flag that is not an arm's to set.
    """
    reader = _Reader(path)
    content = reader.mapping(
        read_texts(path, "STUDY", "keys of a study"), "", ("recipe", "seeds", "arms", "measures"),
        ("about", "flags", "baseline", "points", "tune"),
    )  # fmt: skip
    points = tuple(reader.flags(p, f"points[{k}]") for k, p in enumerate(reader.rows(content.get("points"), "points")))
    points = points or ({},)
    reader.once([slug(label(point)) for point in points], "points")
    arms = tuple(_arm(reader, row, f"arms[{k}]", len(points)) for k, row in enumerate(reader.some(content, "arms")))
    reader.once([slug(arm.name).lower() for arm in arms], "arms", "two arms with the same name, or the same folder")
    measures = tuple(
        _measure(reader, row, f"measures[{k}]") for k, row in enumerate(reader.some(content, "measures"))
    )  # fmt: skip
    reader.once([slug(measure.name).lower() for measure in measures], "measures", "two measures with the same name")
    seeds = reader.seeds(content["seeds"], "seeds")
    baseline = reader.text(content["baseline"], "baseline") if "baseline" in content else arms[0].name
    if baseline not in (names := [arm.name for arm in arms]):
        reader.refuse("baseline", "not the name of an arm", baseline, " | ".join(names), did_you_mean(baseline, names))
    study = Study(
        path, reader.text(content.get("about", ""), "about"), _recipe(reader, content["recipe"]),
        reader.flags(content.get("flags", {}), "flags"), seeds, arms, baseline, points,
        _tuning(reader, content.get("tune"), seeds), measures,
    )  # fmt: skip
    _check_set_once(reader, study)
    return study


def _recipe(reader: _Reader, value: Any) -> Path | tuple[str, ...]:
    if isinstance(value, list):
        words = tuple(reader.text(word, f"recipe[{k}]") for k, word in enumerate(value))
        if not words or not words[0].startswith("--"):
            reader.refuse("recipe", "not a list of flags", " ".join(words) or "nothing", "[--flag, value, --flag, …]")
        return words
    text = reader.text(value, "recipe")
    file = reader.file.parent / text
    if file.suffix != ".sh" or not file.is_file():
        expected = "a shell recipe, from the study's folder on, or a list of flags"
        reader.refuse("recipe", "no such recipe", file, expected)
    return file


def _arm(reader: _Reader, value: Any, key: str, points: int) -> Arm:
    row = reader.mapping(value, key, ("name",), ("flags", "paper"))
    paper = tuple(reader.number(number, f"{key}.paper") for number in reader.rows(row.get("paper"), f"{key}.paper"))
    if len(paper) not in (0, points):
        reader.refuse(f"{key}.paper", "one value per point", len(paper), points)
    return Arm(reader.text(row["name"], f"{key}.name"), reader.flags(row.get("flags", {}), f"{key}.flags"), paper)


def _tuning(reader: _Reader, value: Any, seeds: tuple[int, ...]) -> Tuning | None:
    if value is None:
        return None
    row = reader.mapping(value, "tune", ("flag", "values", "seeds"))
    flag = next(iter(reader.flags({row["flag"]: "x"}, "tune.flag"))) if isinstance(row["flag"], str) else ""
    if not flag:
        reader.refuse("tune.flag", "not a flag", row["flag"])
    values = tuple(reader.text(v, f"tune.values[{k}]") for k, v in enumerate(reader.some(row, "values", "tune.values")))
    reader.once([slug(text) for text in values], "tune.values")
    own = reader.seeds(row["seeds"], "tune.seeds")
    if both := sorted(set(own) & set(seeds)):
        reader.refuse(
            "tune.seeds", "tuned on a seed that the result uses, which favours what was tuned", both[0],
            "seeds that are not among `seeds`",
        )  # fmt: skip
    return Tuning(flag, values, own)


def _measure(reader: _Reader, value: Any, key: str) -> Measure:
    by_script = isinstance(value, dict) and "script" in value
    needed = ("name", "better", "script" if by_script else "metric")
    row = reader.mapping(value, key, needed, ("flags", "value") if by_script else ("at",))
    row |= {name: reader.text(text, f"{key}.{name}") for name, text in row.items() if name != "flags"}
    for name, known in (("better", BETTER), ("at", AT), ("script", SCRIPTS)):
        if name in row and row[name] not in known:
            fix = did_you_mean(row[name], known)
            reader.refuse(f"{key}.{name}", "unknown value", row[name], " | ".join(known), fix)
    flags = reader.flags(row.pop("flags", {}), f"{key}.flags", own={"output": "every evaluation has its own folder"})
    return Measure(**row, flags=tuple(flags.items()))


def _check_set_once(reader: _Reader, study: Study) -> None:
    """An arm, a point and the tuning must not set the same flag: precedence would be ambiguous."""
    tuned = [study.tune.flag] if study.tune else []
    for number, arm in enumerate(study.arms):
        for flag in chain(arm.flags, tuned):
            if any(flag in point for point in study.points):
                reader.refuse(f"points.{flag}", "also set by an arm or tuned", study.arms[number].name)
        if tuned and tuned[0] in arm.flags:
            reader.refuse(f"arms[{number}].flags.{tuned[0]}", "it is tuned", arm.flags[tuned[0]])


class _Reader:
    """The values of a file as types, or a refusal that names file and key."""

    def __init__(self, file: Path):
        self.file = file

    def refuse(
        self, key: str, what: str, found: object = None, expected: object = None, fix: str | None = None
    ) -> NoReturn:
        found = "nothing" if found is None else found
        raise Refusal("C-STUDY", what, file=self.file, key=key or None, found=found, expected=expected, fix=fix)

    def mapping(self, value: Any, key: str, needed: tuple[str, ...], also: tuple[str, ...] = ()) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.refuse(key, "not a mapping", value, "keys and values")
        known = (*needed, *also)
        for name in value:
            if name not in known:
                fix = did_you_mean(str(name), known) or None
                self.refuse(f"{key}.{name}".lstrip("."), "unknown key", name, " | ".join(known), fix)
        for name in needed:
            if value.get(name) is None:
                self.refuse(f"{key}.{name}".lstrip("."), "missing", None, f"the key {name}")
        return dict(value)

    def rows(self, value: Any, key: str) -> list[Any]:
        if value is None:
            return []
        if not isinstance(value, list):
            self.refuse(key, "not a list", value, "[…]")
        return value

    def some(self, content: dict[str, Any], name: str, key: str = "") -> list[Any]:
        if not (rows := self.rows(content[name], key or name)):
            self.refuse(key or name, "an empty list", "nothing", "at least one")
        return rows

    def text(self, value: Any, key: str) -> str:
        """One text, with its variables."""
        if not isinstance(value, str):
            self.refuse(key, "not a text", value, "one value")

        def variable(match: re.Match[str]) -> str:
            text = os.environ.get(match[1], match[2])
            if text is None:
                self.refuse(key, "a variable that is not set", match[0], fix=f"{match[1]}=… before the command")
            return text

        return _VARIABLE.sub(variable, value)

    def number(self, value: Any, key: str) -> float:
        try:
            return float(self.text(value, key))
        except ValueError:
            self.refuse(key, "not a number", value)

    def seeds(self, value: Any, key: str) -> tuple[int, ...]:
        texts = self.some({key: value}, key)
        for text in texts:
            if not (isinstance(text, str) and text.isdecimal() and int(text) < 2**32):
                self.refuse(key, "not a seed", text, "whole numbers from 0 on, below 2³²")
        self.once([str(int(text)) for text in texts], key)
        return tuple(int(text) for text in texts)

    def flags(self, value: Any, key: str, own: dict[str, str] | None = None) -> Flags:
        if not isinstance(value, dict):
            self.refuse(key, "not a mapping", value, "{flag: value}")
        flags: Flags = {}
        for given, words in value.items():
            name, place = given.lstrip("-").replace("-", "_"), f"{key}.{given}"
            if reason := (OWN if own is None else own).get(name):
                self.refuse(place, "not a flag to set here", given, fix=reason)
            if name in flags:
                self.refuse(place, "the flag occurs twice", given)
            texts = words if isinstance(words, list) else [words]
            flags[name] = tuple(self.text(word, place) for word in texts)
            if not texts or any(word.startswith("--") for word in flags[name]):
                self.refuse(place, "not the value of a flag", " ".join(flags[name]) or "[]")
        return flags

    def once(self, names: list[str], key: str, what: str = "duplicate") -> None:
        for name in names:
            if names.count(name) > 1:
                self.refuse(key, what, name, "each once")
