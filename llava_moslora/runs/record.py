"""``run.json``: everything needed to repeat, resume, export or evaluate a run, written when it starts."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_moslora._version import __version__
from llava_moslora.config import XTUNER_DATA_GROUP, AdapterSettings, DataSettings, ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import replace_json
from llava_moslora.files.json import parse_json
from llava_moslora.runs.paths import located
from llava_moslora.sdxl_settings import SdxlAdapterSettings, SdxlSettings, SubjectSettings

RUN, TOKENIZER = "run.json", "tokenizer"
EXPORT = "export.json"  # next to an export's weights: the run that it was exported from
LLAVA, SDXL = "llava", "sdxl"


@dataclass(frozen=True)
class Kind:
    """A kind of run: what its record contains.

    Attributes:
        what: the run, for messages. script: what writes it.
        groups: group of ``settings`` → its class.
        needed: what resuming, export and inference need: group → key → type.
        before: values for runs older than a setting.
        free: what may differ when a run is resumed: output paths, speed, intervals; and the paths of the parts, because
            fingerprints identify them.
    """

    what: str
    script: str
    groups: dict[str, type]
    needed: dict[str, dict[str, Any]]
    before: dict[str, dict[str, Any]]
    free: dict[str, set[str]]


NEEDED: dict[str, dict[str, Any]] = {
    "model": {
        "model_name_or_path": str,
        "vision_tower": str | None,  # None: text only
        "pretrain_mm_mlp_adapter": str | None,
        "version": str,
        "bits": int,
    },
    "data": {"data_path": list | str, "image_aspect_ratio": str},
    "adapter": {"lora_r": int, "vision_lora_r": int},
    "training": {},
    "preprocessor": {},
}
BEFORE: dict[str, dict[str, Any]] = {
    "model": {"attn_implementation": "sdpa"},
    "data": {
        "data_columns": [],
        "data_weights": [],
        "data_group": XTUNER_DATA_GROUP,
        "image_engine": "pil",
        "decode_images": False,
        "eval_data_path": [],
        "validation_split": 0.0,
        "data_share": 1.0,
        "train_on_prompt": False,
    },
    "adapter": {"method": "moslora"},
    "training": {
        "lora_plus_ratio": 1.0,
        "riemannian": False,
        "dropout_masks": "cpu generator",
        "loss_average": "tokens",
        "packing": False,
        "early_stopping_threshold": 0.0,
        "load_best_model_at_end": False,
    },
}
KINDS = {
    LLAVA: Kind(
        what="a LLaVA or an LLM",
        script="scripts/train_vit_llm.py",
        groups={"model": ModelSettings, "data": DataSettings, "adapter": AdapterSettings},
        needed=NEEDED,
        before=BEFORE,
        free={
            "data": {"data_cache", "preprocessing_num_workers", "decode_images"},
            "model": {"model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter"},
            "adapter": set(),
        },
    ),
    SDXL: Kind(
        what="Stable Diffusion XL",
        script="scripts/train_sdxl.py",
        groups={"model": SdxlSettings, "data": SubjectSettings, "adapter": SdxlAdapterSettings},
        needed={
            "model": {"model_name_or_path": str},
            "data": {"image_folder": str, "prompt": str, "resolution": int},
            "adapter": {"lora_r": int},
            "training": {},
            "preprocessor": {},
        },
        before={"model": {}, "data": {}, "adapter": {}, "training": BEFORE["training"]},
        free={
            "model": {"model_name_or_path", "vae"},
            "data": {"image_folder", "class_image_folder", "data_cache"},
            "adapter": set(),
        },
    ),
}
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "bitsandbytes", "safetensors",
             "diffusers")  # fmt: skip
_ABSENT = object()


@dataclass
class RunSettings:
    """The settings of a run, with every default resolved.

    Attributes:
        kind: a key of :data:`KINDS`, whose classes ``model``, ``data`` and ``adapter`` have.
        model: with ``version``, the conversation template, and the three parts named separately.
        training: the values of :class:`llava_moslora.training.arguments.TrainingArguments`, and ``dropout_masks``, the
            source of the masks.
        preprocessor: the vision tower's image-processor settings; empty for text only.
        global_batch_size: records per optimizer step on all ranks together.
    """

    model: ModelSettings
    data: DataSettings
    adapter: AdapterSettings
    training: dict[str, Any]
    preprocessor: dict[str, Any]
    global_batch_size: int | None = None
    kind: str = LLAVA

    def training_value(self, name: str) -> Any:
        """A value of ``training``; for a run older than the setting, the behaviour at the time."""
        value = self.training.get(name, BEFORE["training"].get(name))
        return None if value == "None" else value  # as the Trainer's arguments write it


@dataclass
class RunRecord(RunSettings):
    """The content of ``run.json``.

    Attributes:
        seeds: several where a run was resumed with ``--allow_change seed``.
        command: the command line. folder: base of its relative paths; None: run of an earlier version.
        versions: of the packages it ran with.
        unknown: settings that this version of the package does not know, by name.
    """

    seeds: list[int | None] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    folder: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)

    @property
    def located(self) -> RunRecord:
        """The same with absolute paths."""
        model, data = located(self.model, self.folder), located(self.data, self.folder)
        return replace(self, model=model, data=data)


def write_run(folder: Path, settings: RunSettings) -> None:
    """Write ``run.json`` into ``folder``: the settings and how the run was started.

    On resume the record keeps the seeds that its earlier checkpoints were trained with.
    """
    seeds = read_run(folder, settings.kind).seeds if (folder / RUN).is_file() else []
    record = {
        "llava_moslora": __version__,
        "settings": asdict(settings),
        "seeds": list(dict.fromkeys([*seeds, settings.training.get("seed")])),
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "versions": {name: _installed(name) for name in _PACKAGES},
        "commit": _commit(),
    }
    replace_json(folder / RUN, record)


def read_run(folder: str | Path, expected: str | None = LLAVA) -> RunRecord:
    """``run.json`` of a run folder, also of one that an earlier version of this package wrote.

    Args:
        expected: the kind of run that the caller understands; None: any.

    Raises:
        Refusal: C-PATH, the folder is missing or holds no run; K-RUN, its record is damaged, of something else, of
            another kind of run, or lacks something that this version of the package needs.
    """
    file = Path(folder) / RUN
    record = _read_ours(file, expected)
    kind = _kind_of(record, file, expected)
    _check_needed(record, file, KINDS[kind].needed)
    settings = record["settings"]
    known: dict[str, dict] = {}
    unknown: dict[str, Any] = {}
    for group, group_class in KINDS[kind].groups.items():
        stored = KINDS[kind].before[group] | settings[group]
        names = {f.name for f in fields(group_class)}
        known[group] = {name: value for name, value in stored.items() if name in names}
        unknown |= {name: value for name, value in stored.items() if name not in names}
    if isinstance(path := known["data"].get("data_path"), str):  # before there could be several
        known["data"]["data_path"] = [path]
    for group, group_class in KINDS[kind].groups.items():
        for f in fields(group_class):
            if f.name in known[group] and not _fits(known[group][f.name], str(f.type)):
                raise _lacks(record, file, ("settings", group, f.name), known[group][f.name], f.type)
    try:
        groups = {group: group_class(**known[group]) for group, group_class in KINDS[kind].groups.items()}
    except Refusal as refusal:
        raise Refusal(
            "K-RUN", "a value that this version of the package does not know", file=file, key=refusal.key,
            found=refusal.found, expected=refusal.expected, fix="use the version of this package that wrote it",
        ) from refusal  # fmt: skip
    return RunRecord(
        **groups,
        training=settings["training"],
        preprocessor=settings["preprocessor"],
        global_batch_size=settings.get("global_batch_size"),
        kind=kind,
        seeds=record.get("seeds") or [settings["training"].get("seed")],
        command=record["command"],
        folder=record.get("folder"),
        versions=record["versions"],
        unknown=unknown,
    )


def _read_ours(file: Path, expected: str | None) -> dict[str, Any]:
    if not file.is_file():
        scripts = " or ".join(kind.script for name, kind in KINDS.items() if expected in (name, None))
        raise Refusal(
            "C-PATH", "not a run folder" if file.parent.is_dir() else "no such folder", file=file.parent,
            expected=f"a folder with {RUN}, as --output_dir of {scripts}",
            fix="give the --output_dir of a training run",
        )  # fmt: skip
    try:
        record = parse_json(file.read_bytes(), finite=False)
    except (OSError, ValueError) as error:
        raise Refusal("K-RUN", "not JSON: damaged", file=file, found=error, fix="restore a copy of it") from error
    if not _is_ours(record):
        raise Refusal("K-RUN", "not a record of this package's runs", file=file, fix="another folder")
    return record


def _kind_of(record: dict[str, Any], file: Path, expected: str | None) -> str:
    kind = record["settings"].get("kind", LLAVA)
    if not (isinstance(kind, str) and kind in KINDS):
        what, fix = "a kind of run that this version of the package does not know", "use the version that wrote it"
        raise Refusal("K-RUN", what, file=file, key="settings.kind", found=kind, expected=" | ".join(KINDS), fix=fix)
    if expected is not None and kind != expected:
        fix = "scripts/export.py --format diffusers takes it" if kind == SDXL else "give a run of the other script"
        raise Refusal(
            "K-RUN", "another kind of run", file=file, found=f"{KINDS[kind].what}, by {KINDS[kind].script}",
            expected=f"{KINDS[expected].what}, by {KINDS[expected].script}", fix=fix,
        )  # fmt: skip
    return kind


def _check_needed(record: dict[str, Any], file: Path, groups: dict[str, dict[str, Any]]) -> None:
    needed: dict[tuple[str, ...], Any] = {(group,): dict for group in groups}
    needed |= {(group, key): kind for group, keys in groups.items() for key, kind in keys.items()}
    needed = {("settings", *path): kind for path, kind in needed.items()} | {("command",): list, ("versions",): dict}
    for path, kind in needed.items():
        value: Any = record
        for key in path:
            value = value.get(key, _ABSENT)  # its group is a dict: groups are checked first
        if not isinstance(value, kind):
            raise _lacks(record, file, path, value, kind)
    for key, kind in (("seeds", list), ("folder", str), ("settings.global_batch_size", int)):
        value = record["settings"].get("global_batch_size") if "." in key else record.get(key)
        if value is not None and not isinstance(value, kind):
            raise _lacks(record, file, (key,), value, kind)


def _lacks(record: dict[str, Any], file: Path, path: tuple[str, ...], value: object, kind: object) -> Refusal:
    return Refusal(
        "K-RUN", "lacks something that this version of the package needs", file=file, key=".".join(path),
        found=f"{'nothing' if value is _ABSENT else value}, written by version {record['llava_moslora']}",
        expected=f"{getattr(kind, '__name__', kind)}, as version {__version__} writes it",
        fix="use the version of this package that wrote it, or restore a copy of it",
    )  # fmt: skip


_TYPES: dict[str, Any] = {"int": int, "float": int | float, "str": str, "bool": bool, "None": type(None), "dict": dict}


def _fits(value: object, annotation: str) -> bool:
    """Whether ``value``, of JSON, is of a settings field's type, such as ``int``, ``str | None``, ``list[float]``."""
    for part in re.split(r"\s*\|\s*", annotation):
        if inner := re.fullmatch(r"list\[(.+)\]", part):
            if isinstance(value, list) and all(_fits(one, inner[1]) for one in value):
                return True
        elif isinstance(value, _TYPES[part.split("[")[0]]) and (part == "bool" or not isinstance(value, bool)):
            return True
    return False


def is_run(folder: Path) -> bool:
    """Whether ``run.json`` is there and this package, of whatever version, wrote it."""
    try:
        return _is_ours(parse_json((folder / RUN).read_bytes(), finite=False))
    except (OSError, ValueError):
        return False


def _is_ours(record: object) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("llava_moslora"), str)
        and isinstance(record.get("settings"), dict)
    )


def check_seed(record: RunRecord, checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Refuse (K-SEED) a checkpoint of another run that was copied in; ``manifest`` is the checkpoint's."""
    if (seed := manifest.get("seed")) not in record.seeds:
        raise Refusal(
            "K-SEED", "a checkpoint of a run with another seed", file=checkpoint, found=f"seed {seed}",
            expected=f"seed {' or '.join(map(str, record.seeds))}", fix="move it out of the run folder",
        )  # fmt: skip


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package runs from, if it is one and git is there."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None
