"""Checks the content of ``--output_dir`` when a run begins or is resumed there.

A file that no run writes is never deleted: next to a run's own files it is kept, inside a run's folders it is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llava_moslora.config import DataSettings, TrainingSettings
from llava_moslora.errors import NOT_OF_THE_PLACE, Refusal
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
    run = training.run_folder
    with _cannot_be_written(run):
        place = real_place(run)
        if place.exists() and not place.is_dir():
            raise _refusal("not a folder", run, fix="choose another path")
    if data is not None and _lies_in(Path(data.data_cache), run):
        raise Refusal(
            "C-OUTPUT", "the data cache is in the run folder", file=data.data_cache, key="--data_cache",
            fix="choose another --data_cache; several runs on the same data share it",
        )  # fmt: skip
    if place.is_dir():
        _check_content(run, training.resume, training.overwrite, inputs)
    with _cannot_be_written(run):
        _try_to_write(place)


@contextmanager
def _cannot_be_written(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in NOT_OF_THE_PLACE:
            raise
        fix = "choose another path, or change its permissions"
        raise _refusal("cannot be written to", run, found=error.strerror, fix=fix) from error


def real_place(folder: Path) -> Path:
    """``folder``, which need not be there, as an absolute path without links and ``..``.

    Raises:
        Refusal: C-OUTPUT, a link on the way leads nowhere: its disk is not mounted, and what is written behind it would
            fail, or land on another one.
    """
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.is_symlink() and not place.exists():
            raise _refusal(
                "a link to a place that is not there", place, found=os.readlink(place),
                fix="mount its disk or mend the link, or choose another path",
            )  # fmt: skip
    return folder.resolve()


def _try_to_write(place: Path) -> None:
    """Make a hidden folder, in it the folders that are missing at ``place``, and a file; then remove them again.

    Whoever else begins a run there at the same time sees no folder come and go.
    """
    above = next(p for p in (place, *place.parents) if p.exists())
    with TemporaryDirectory(dir=above, prefix=".", suffix=".probe") as probe:
        folder = Path(probe) / place.relative_to(above)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RUN).touch()


def _check_content(run: Path, resume: bool, overwrite: bool, inputs: Iterable[tuple[str, Path]]) -> None:
    """Refuse what is in a run folder that exists, as :func:`check_output` says."""
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
