"""The training records of a run, and its validation data: separate files, a share of the training files, or both.

Whether a record is in that share depends only on its content (:func:`llava_moslora.data.tokenise.record_hash`):
adding, removing or reordering records moves none of the others, and neither does another tokenizer, template or length
limit. A larger share contains the records of a smaller one, and copies of a record are in the same split.

``--data_share`` trains on a subset of the remaining records, a different one for every seed, the same for every method;
a larger share contains the smaller ones (the paper's Figure 4).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets

from llava_moslora.config import NAMED_FILE, DataSettings
from llava_moslora.data.cache import folders_of, keys_of
from llava_moslora.errors import Refusal


@dataclass(frozen=True)
class ValidationData:
    """The validation records of a run.

    Attributes:
        dataset: rows as :func:`llava_moslora.data.prepare.prepare` makes them; not all of them are validation data.
        sets: name → int64[n], the rows of one validation set: of one data file.
        files: a row's ``source`` is a position in it.
    """

    dataset: Dataset
    sets: dict[str, np.ndarray]
    files: tuple[str, ...]

    def summary(self) -> str:
        """For people."""
        return "validation: " + "  ".join(f"{name}: {len(rows):,} records" for name, rows in self.sets.items())


def eval_files(settings: DataSettings) -> dict[str, str]:
    """Name → file, from ``--eval_data_path``.

    Raises:
        Refusal: C-FLAG, two of one name.
    """
    files: dict[str, str] = {}
    for value in settings.eval_data_path:
        named = None if Path(value).exists() else NAMED_FILE.fullmatch(value)
        name, file = named.groups() if named else (_name_of(value), value)
        if name in files:
            raise Refusal(
                "C-FLAG", "duplicate validation set name", key="--eval_data_path", found=f"{files[name]} and {file}",
                fix=f"name them: --eval_data_path {name}_1={files[name]} {name}_2={file}",
            )  # fmt: skip
        files[name] = file
    return files


def set_names(settings: DataSettings) -> list[str]:
    """The validation sets of a run: first those split off, one per file of ``--data_path``, then those of
    ``--eval_data_path``.

    Raises:
        Refusal: C-FLAG, two of one name.
    """
    split = [_name_of(path) for path in settings.data_path] if settings.validation_split else []
    times = Counter(split)
    split = [f"{name}_{k}" if times[name] > 1 else name for k, name in enumerate(split, start=1)]
    files = eval_files(settings)
    if both := [name for name in files if name in split]:
        raise Refusal(
            "C-FLAG", "a validation set with the name of a data file that is split", key="--eval_data_path",
            found=both[0], fix=f"name it: --eval_data_path {both[0]}_eval={files[both[0]]}",
        )  # fmt: skip
    return [*split, *files]


def validation_data(
    dataset: Dataset, settings: DataSettings, prepare: Callable[[DataSettings], Dataset], *, seed: int = 0
) -> tuple[np.ndarray, ValidationData | None, dict[str, list[str]]]:
    """The rows of ``dataset`` that are trained on, int64[n] in increasing order; the validation data, if any; and
    ``data``, ``validation``: fingerprints of both (:func:`llava_moslora.data.cache.keys_of`).

    Args:
        dataset: of ``settings.data_path``.
        prepare: prepares a data set in the same way.
        seed: of the order of the records, which also draws ``settings.data_share``.

    Raises:
        Refusal: as ``prepare``; C-FLAG, two names alike; D-NONE, no record of a file falls into a share, or all into
            the validation split; D-TWICE, a file is trained on and evaluated.
    """
    names, files = set_names(settings), eval_files(settings)
    rows = np.arange(len(dataset))
    if not names:
        rows = drawn_share(dataset, rows, settings, seed)
        return rows, None, {"data": keys_of(dataset, rows)}
    sources = np.asarray(dataset["source"][:])
    sets: list[np.ndarray] = []
    keys: list[str] = []
    if settings.validation_split:
        held_out = np.asarray(dataset["hash"][:], dtype=np.uint64) < round(settings.validation_split * 2**64)
        sets = [np.flatnonzero(held_out & (sources == k)) for k in range(len(settings.data_path))]
        for file, chosen, records in zip(settings.data_path, sets, np.bincount(sources), strict=True):
            if not 0 < len(chosen) < records:
                raise Refusal(
                    "D-NONE", f"{len(chosen)} of its {records} records fall into the validation split", file=file,
                    key="--validation_split", found=settings.validation_split,
                    fix="another share, or --eval_data_path with a file of validation data",
                )  # fmt: skip
        rows = rows[~held_out]
        keys += keys_of(dataset, np.flatnonzero(held_out))
    rows = drawn_share(dataset, rows, settings, seed)
    trained_keys = keys_of(dataset, rows)
    if files:
        evaluated = _prepare_eval(files, settings, prepare)
        for name, folder in zip(files, folders_of(evaluated), strict=True):
            if folder in folders_of(dataset):
                raise Refusal(
                    "D-TWICE", "validation data that are also training data", file=files[name], fix="another file"
                )
        keys += keys_of(evaluated)
        moved = np.asarray(evaluated["source"][:]) + len(settings.data_path)
        sets += [len(dataset) + np.flatnonzero(moved == len(settings.data_path) + k) for k in range(len(files))]
        evaluated = evaluated.remove_columns("source").add_column("source", moved.astype(np.int32))
        dataset = concatenate_datasets([dataset, evaluated])
    all_files = (*settings.data_path, *files.values())
    validation = ValidationData(dataset, dict(zip(names, sets, strict=True)), all_files)
    return rows, validation, {"data": trained_keys, "validation": keys}


def drawn_share(dataset: Dataset, rows: np.ndarray, settings: DataSettings, seed: int) -> np.ndarray:
    """Of ``rows``, int64[n], the share ``settings.data_share`` of each data file, to the nearest record; in order.

    Records are ranked by a hash of their content and the seed; the first ones are taken. So shares of one seed are
    nested, those of different seeds differ, and neither correlates with the validation split.

    Raises:
        Refusal: D-NONE, no record of a file is left.
    """
    if settings.data_share == 1:
        return rows
    sources, hashes = (np.asarray(dataset[name][:])[rows] for name in ("source", "hash"))
    places, chosen = _mixed(hashes.astype(np.uint64), seed), []
    for number, file in enumerate(settings.data_path):
        mine = np.flatnonzero(sources == number)
        wanted = round(settings.data_share * len(mine))
        if not wanted:
            raise Refusal(
                "D-NONE", f"none of its {len(mine)} records is in the share", file=file, key="--data_share",
                found=settings.data_share, fix="use a larger share",
            )  # fmt: skip
        chosen.append(mine[np.argsort(places[mine], kind="stable")[:wanted]])
    return rows[np.sort(np.concatenate(chosen))]


def _mixed(hashes: np.ndarray, seed: int) -> np.ndarray:
    """uint64[n]: other numbers for every seed, by SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    z = hashes + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)  # wraps around, as intended
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _prepare_eval(files: dict[str, str], settings: DataSettings, prepare: Callable[[DataSettings], Dataset]) -> Dataset:
    try:
        return prepare(
            replace(settings, data_path=list(files.values()), data_weights=[], validation_split=0.0, data_share=1.0)
        )
    except Refusal as refusal:  # which speaks of training data
        parts = {name: getattr(refusal, name) for name in ("key", "fix")}
        parts = {name: text and text.replace("--data_path", "--eval_data_path") for name, text in parts.items()}
        raise Refusal(**{**vars(refusal), **parts}) from None


def _name_of(path: str) -> str:
    """A set's name from its file: the stem, or of a pattern the folder's name."""
    place = Path(path)
    name = place.parent.name if "*" in place.name or "?" in place.name else place.stem
    # logged as eval_NAME_loss: transformers takes a name that begins so for one that is complete
    return re.sub(r"[^\w.-]", "_", name).removeprefix("eval_") or "validation"
