"""The command line of ``scripts/train_vit_llm.py``: the settings of :mod:`llava_moslora.config` and transformers' own.

The same flags can come from one YAML or JSON file (``--config FILE``); the command line takes precedence. Neither torch
nor transformers is imported: a mistyped flag is reported before that.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from llava_moslora.config import HEADINGS, MODEL, AdapterSettings, DataSettings, ModelSettings, TrainingSettings
from llava_moslora.errors import Refusal
from llava_moslora.flags import Flag, SettingsParser, flags_of, with_home
from llava_moslora.runs.output_dir import check_output
from llava_moslora.training import trainer_flags
from llava_moslora.training.config_file import read_config
from llava_moslora.training.deepspeed_config import read_deepspeed_config
from llava_moslora.training.flag_texts import more_help

SETTINGS = (ModelSettings, DataSettings, AdapterSettings, TrainingSettings)


class Parser(SettingsParser):
    """Every flag of a training."""

    def __init__(self, description: str | None = None):
        own = [flag for group in SETTINGS for flag in flags_of(group)]
        known = {flag.name for flag in own}
        trainers = [flag for flag in trainer_flags.flags() if flag.name not in known]
        first = Flag("config", "str | None", None, "YAML or JSON file with the same flags", group=MODEL)
        super().__init__([first, *own, *trainers], description, HEADINGS, more_help)

    def unknown(self, name: str) -> str:
        return (trainer_flags.FORMER | trainer_flags.LLAMA_FACTORY).get(name.replace("-", "_")) or super().unknown(name)


def parse(
    argv: Sequence[str], description: str | None = None
) -> tuple[ModelSettings, DataSettings, AdapterSettings, dict[str, Any]]:
    """The settings from a command line; those of training as the values to build ``TrainingArguments`` from.

    They are not built here, because transformers' part imports torch, and initialises the device and the process
    group, which this package joins first. All checks that do not need them are done here.

    Raises:
        Refusal: an unknown flag (with the closest name), a missing one, a value of the wrong type, not a choice, out of
            range, or without effect; a configuration or DeepSpeed file that is missing or not JSON/YAML.
    """
    (model, data, adapter, _), training = parse_with(Parser(description), SETTINGS, argv)
    return model, data, adapter, training


def parse_with(parser: SettingsParser, groups: Sequence[type], argv: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """The flags of ``parser``, whose first is ``--config``, as one object of each of ``groups``, the last of which are
    :class:`TrainingSettings`, and as values for ``TrainingArguments``. The parser may leave out flags of training.

    Raises:
        Refusal: as :func:`parse`.
    """
    content: dict[str, str | list[str]] = {}
    argv = list(map(with_home, argv))
    given_here = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    if file := early(argv).config:
        content = read_config(Path(file))
        argv = [*_as_flags(content, parser, file), *argv]
    if (deepspeed := early(argv).deepspeed) is not None:
        read_deepspeed_config(deepspeed)  # the Trainer uses it while it parses its flags
    with _naming_file(file, content.keys() - given_here):
        values = vars(parser.parse_args(argv))
        given = [{f.name: values.pop(f.name) for f in fields(group) if f.name in values} for group in groups]
        del values["config"]
        trainer_flags.check_flags(values)
        _check_timeout(values["ddp_timeout"])
        return [settings(**known) for settings, known in zip(groups, given, strict=True)], given[-1] | values


@contextmanager
def _naming_file(file: str, names: Collection[str]) -> Iterator[None]:
    """The refusal of a flag that only the file of --config gives names the file; ``names``: those flags."""
    try:
        yield
    except Refusal as refusal:
        name = (refusal.key or "").removeprefix("--")
        if refusal.file is not None or name not in names:
            raise
        raise Refusal(**{**vars(refusal), "file": file, "key": name}) from refusal


def check_places(model: ModelSettings, data: DataSettings, adapter: AdapterSettings, training: dict[str, Any]) -> None:
    """What can be said of a training's folders in the second before torch is imported.

    Only where all ranks are on one host, whose launcher ends them together: those of another host would wait for a rank
    that never joins until ``ddp_timeout``. There all this is checked after joining. Rank 0 alone looks at the run's.

    Raises:
        Refusal: C-PATH, no folder of the LLM; I-FOLDER; C-OUTPUT, as
            :func:`llava_moslora.runs.output_dir.check_output`, which is asked again with the inputs.
    """
    if "RANK" in os.environ and not _all_on_this_host():
        return
    if not Path(model.model_name_or_path).is_dir():
        raise Refusal(
            "C-PATH", "no such folder", file=model.model_name_or_path, key="--model_name_or_path",
            fix="check the path, or download the model first: nothing is fetched at run time",
        )  # fmt: skip
    if data.image_folder is not None and not Path(data.image_folder).is_dir():
        what = "not a folder" if Path(data.image_folder).exists() else "there is no such folder"
        raise Refusal("I-FOLDER", what, file=data.image_folder, fix="check --image_folder")
    if os.environ.get("RANK", "0") == "0":
        check_output(TrainingSettings(**{f.name: training[f.name] for f in fields(TrainingSettings)}), (), data)


def _all_on_this_host() -> bool:
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"  # torchrun's, DeepSpeed's
    return os.environ.get("WORLD_SIZE") == local


def early(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of files that are read before the others are parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--deepspeed")
    return parser.parse_known_args(argv)[0]


def _check_timeout(seconds: int) -> None:
    try:
        usable = timedelta(seconds=seconds) >= timedelta(seconds=1)
    except OverflowError:
        usable = False
    if not usable:
        raise Refusal("C-FLAG", "out of range", key="--ddp_timeout", found=seconds, expected="at least 1 second")


def _as_flags(content: dict[str, str | list[str]], parser: SettingsParser, path: str) -> list[str]:
    known = {flag.name for flag in parser.flags[1:]}
    if unknown := [str(key) for key in content if key not in known]:
        raise parser.refuse_unknown("key", unknown, path)
    flags: list[str] = []
    for key, value in content.items():
        flags += [f"--{key}", *value] if isinstance(value, list) else [f"--{key}={value}"]
    return list(map(with_home, flags))


def accumulation_steps(global_batch_size: int, per_device: int, ranks: int) -> int:
    """Micro-batches of ``per_device`` records that make ``global_batch_size`` on ``ranks`` ranks.

    Raises:
        Refusal: C-FLAG, no number of them is exactly ``global_batch_size``.
    """
    micro_batch = max(per_device, 1) * ranks  # a batch size below 1 is refused later (validate.py)
    steps, rest = divmod(global_batch_size, micro_batch)
    if steps > 0 and not rest:
        return steps
    nearest = [k * micro_batch for k in (steps, steps + 1) if k > 0]
    smaller = [n for n in range(per_device, 0, -1) if global_batch_size > 0 and global_batch_size % (n * ranks) == 0]
    fixes = [f"--global_batch_size {' or '.join(map(str, nearest))}"]
    fixes += [f"--per_device_train_batch_size {n}" for n in smaller[:1]]
    raise Refusal(
        "C-FLAG", "not a multiple of the micro-batches of all ranks", key="--global_batch_size",
        found=global_batch_size, expected=f"a multiple of {micro_batch} = {per_device} per device × {ranks} ranks",
        fix=", or ".join(fixes),
    )  # fmt: skip
