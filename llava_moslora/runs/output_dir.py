"""Checks the content of ``--output_dir`` when a run begins or is resumed there.

A file that no run writes is never deleted: next to a run's own files it is kept, inside a run's folders it is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_moslora.config import DataSettings, TrainingSettings
from llava_moslora.errors import Refusal
from llava_moslora.files.manifest import MANIFEST
from llava_moslora.runs.checkpoints import CHECKPOINT, checkpoints
from llava_moslora.runs.log import METRICS_FILE, read_rows
from llava_moslora.runs.record import EXPORT, RUN, TOKENIZER, is_run
from llava_moslora.sdxl_settings import SubjectSettings

DATA_REPORT = "data"
# Everything that a run writes, by its path in the run folder; NAMES are the first parts of these paths, but for
# checkpoints.
WRITTEN = re.compile(
    r"run\.json|plan\.json|trackers\.json|metrics\.jsonl|curves\.html|samples\.(jsonl|html)|nonfinite\.json"
    r"|data/report\.(json|html)|tokenizer/(tokenizer\.(json|model)|(tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.jinja)"
    r"|tensorboard/events\.out\.tfevents\.[^/]+"
    r"|checkpoint-\d+/(MANIFEST|trainer_state|position|random-\d+)\.json|checkpoint-\d+/optimizer\.safetensors"
    r"|checkpoint-\d+/adapter/(adapter_config\.json|adapter_model\.safetensors|README\.md)"
    r"|checkpoint-\d+/projector/model\.safetensors"
)
NAMES = re.compile(
    rf"run\.json|plan\.json|trackers\.json|metrics\.jsonl|curves\.html|samples\.(jsonl|html)|nonfinite\.json"
    rf"|{DATA_REPORT}|{TOKENIZER}|tensorboard"
)
# What job schedulers and shells write: slurm-12.out, train.o4711 (PBS), nohup.out, ``tee RUN/log``.
JOB_LOG = re.compile(r".*\.(out|err|log|[oe]\d+)|log")


def check_output(
    training: TrainingSettings,
    inputs: Iterable[tuple[str, Path]] = (),
    data: DataSettings | SubjectSettings | None = None,
) -> None:
    """Refuse a run folder that cannot be used, before anything is loaded.

    Args:
        training: its ``output_dir``, and whether a run there is to be resumed or deleted.
        inputs: by flag, what this training reads (:func:`llava_moslora.training.arguments.input_paths`).
        data: whose cache must not be in the run folder.

    Raises:
        Refusal: C-OUTPUT, it is no folder, cannot be written to, or holds something that is neither to be resumed nor
            to be deleted: not a run, a file that no run writes inside a run's own folders, an input.
    """
    run, resume, overwrite = training.run_folder, training.resume, training.overwrite
    if run.exists() and not run.is_dir():
        raise _refusal("not a folder", run, fix="choose another path")
    place = next(p for p in (run, *run.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise _refusal("cannot be written to", place, fix="choose another path, or change its permissions")
    if data is not None and _lies_in(Path(data.data_cache), run):
        raise Refusal(
            "C-OUTPUT", "the data cache is in the run folder", file=data.data_cache, key="--data_cache",
            fix="choose another --data_cache; several runs on the same data share it",
        )  # fmt: skip
    if not run.is_dir():
        return
    if not (run / RUN).exists():
        _check_no_run(run, resume, overwrite)
        return
    if not is_run(run):
        raise _refusal(f"{RUN} is not a record of this package's runs", run, fix="choose another folder")
    if overwrite or not has_begun(run):
        _check_replaceable(run, inputs, [run] if overwrite else files_of_run(run))
    elif not resume:
        raise _refusal(
            "the folder is not empty", run, found=_names(_content(run)),
            fix="--resume True to continue this run, --overwrite True to delete it, or another folder",
        )  # fmt: skip


def _check_no_run(run: Path, resume: bool, overwrite: bool) -> None:
    """A folder without a run: a new one may begin next to a job's log; next to other files only with ``resume``, which
    refers to exactly this folder; never if it would mix with a checkpoint, an export or the remains of a run."""
    ours = [*files_of_run(run), *(run / name for name in (MANIFEST, EXPORT) if (run / name).exists())]
    others = [path for path in _content(run) if not _is_job_log(path)]
    if not ours and (resume or not others):
        return
    what = "not a run: nothing is deleted here" if overwrite else "not a run: nothing to resume"
    raise _refusal(
        what if resume or overwrite else "the folder is not empty", run, found=_names(ours if resume else others),
        expected=f"{RUN} in it" if resume or overwrite else None, fix="choose another folder",
    )  # fmt: skip


def _check_replaceable(run: Path, inputs: Iterable[tuple[str, Path]], places: list[Path]) -> None:
    strange = [path for own in files_of_run(run) for path in _files(own) if not WRITTEN.fullmatch(_relative(path, run))]
    if strange:
        raise _refusal(
            "the run to be deleted contains files that no run writes", run,
            found=", ".join(_relative(path, run) for path in strange[:5]), fix="move them elsewhere",
        )  # fmt: skip
    for flag, path in inputs:
        if any(_lies_in(path, place) for place in places):
            raise Refusal(
                "C-OUTPUT", "an input is in the run folder that is to be replaced", file=path, key=flag,
                fix="move it elsewhere, or choose another --output_dir",
            )  # fmt: skip


def files_of_run(run: Path) -> list[Path]:
    """The files and folders directly in ``run`` whose name is one that a run writes."""
    return [p for p in run.iterdir() if NAMES.fullmatch(p.name) or CHECKPOINT.fullmatch(p.name)]


def has_begun(run: Path) -> bool:
    """Whether ``run`` contains a run that saved or logged a step; one that did neither can be restarted."""
    return (run / RUN).is_file() and bool(checkpoints(run) or read_rows(run / METRICS_FILE))


def _content(run: Path) -> list[Path]:
    """The folder's content, except the lock and unfinished files of a killed process."""
    return [p for p in run.iterdir() if not p.name.startswith(".")]


def _files(path: Path) -> list[Path]:
    """Files and links at and below ``path``; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return [path]
    return [file for child in sorted(path.iterdir()) for file in _files(child)]


def _is_job_log(path: Path) -> bool:
    """Whether it is a log, or a folder with nothing else."""
    if path.is_dir() and not path.is_symlink():
        files = _files(path)
        return bool(files) and all(JOB_LOG.fullmatch(file.name) for file in files)
    return JOB_LOG.fullmatch(path.name) is not None


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether ``path``, or of a pattern or a missing path the folder above it, is ``folder`` or lies in it."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    place = next(p for p in (path, *path.parents) if p.exists())
    return place.resolve().is_relative_to(folder.resolve()) or path.is_relative_to(folder)


def _relative(path: Path, run: Path) -> str:
    return path.relative_to(run).as_posix()


def _names(paths: list[Path]) -> str:
    return ", ".join(sorted(path.name for path in paths)[:5])


def _refusal(what: str, file: Path, **parts: Any) -> Refusal:
    return Refusal("C-OUTPUT", what, file=file, key="--output_dir", **parts)
