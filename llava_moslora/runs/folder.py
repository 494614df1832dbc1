"""Opening ``--output_dir``: a new run, or the old run at its newest checkpoint, and never a mixture.

Everything is checked before a file of an old run is changed. A run that is replaced is set aside first, deleted last.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from llava_moslora.config import TrainingSettings
from llava_moslora.distributed import from_all_ranks, from_rank_0, rank
from llava_moslora.errors import Refusal
from llava_moslora.files import disk
from llava_moslora.files.manifest import read_facts
from llava_moslora.files.publish import sweep
from llava_moslora.runs.checkpoints import checkpoints, lock_run, newest_valid
from llava_moslora.runs.output_dir import DATA_REPORT, check_output, files_of_run, has_begun
from llava_moslora.runs.paths import located, same_paths
from llava_moslora.runs.record import (
    KINDS,
    LLAVA,
    RUN,
    TOKENIZER,
    RunRecord,
    RunSettings,
    check_seed,
    read_run,
    write_run,
)

SET_ASIDE = ".aside"  # suffix of folders that hold a run that is being replaced

# The Trainer's settings that change what is computed.
TRAINING = (
    *("learning_rate", "vision_lr", "mm_projector_lr", "mixer_lr", "weight_decay", "max_grad_norm"),
    *("lora_plus_ratio", "riemannian"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("loss_average", "average_tokens_across_devices", "packing", "seed", "data_seed", "bf16", "fp16"),
    *("label_smoothing_factor", "neftune_noise_alpha"),
    *("use_liger_kernel", "torch_compile", "tf32", "full_determinism", "dropout_masks"),
    *("metric_for_best_model", "greater_is_better", "early_stopping_patience", "early_stopping_threshold"),
)

# Settings that change every row of the prepared data, and so their fingerprints (data.cache.cache_key)
TOKENISED = {"model_max_length", "version", "train_on_prompt", "data_columns"}


def check_resume(training: TrainingSettings, settings: RunSettings, fingerprints: dict[str, Any]) -> None:
    """With ``resume``: refuse, before any weights are loaded, settings that differ from the run in ``output_dir``.

    Takes no lock and reads no weights: damaged or just deleted checkpoints are handled by :func:`open_run`. May be
    called before the data are read, without their fingerprints. Only rank 0 looks.

    Raises:
        Refusal: K-CHANGED, as :func:`open_run`; K-RUN, run.json is damaged.
    """
    run = training.run_folder
    if rank() > 0 or not (training.resume and has_begun(run)):
        return
    facts = None
    for checkpoint in checkpoints(run)[:1]:
        try:
            facts = read_facts(checkpoint)
        except (Refusal, OSError):
            continue
    changed = changes(read_run(run, settings.kind), settings)
    _refuse_changes(run, changed, facts, fingerprints, training.allow_change, settings)


def open_run(
    training: TrainingSettings,
    settings: RunSettings,
    fingerprints: dict[str, Any],
    inputs: Iterable[tuple[str, Path]] = (),
) -> tuple[FileLock, Path | None]:
    """Lock ``output_dir``; return the lock and the checkpoint to resume from, None for a new run.

    This loads no weights and changes nothing of a run in the folder (:func:`begin_run` replaces it).

    Args:
        settings: of this call. fingerprints: of its inputs, as every checkpoint's manifest states them.
        inputs: as for :func:`check_output`.

    Raises:
        Refusal: as :func:`check_output`; C-LOCKED, the folder is in use. To resume: K-CHANGED, settings or inputs
            differ from the run's, and ``allow_change`` does not name them; K-NONE, there are checkpoints, none valid;
            the newest is not this run's own.
    """
    run = training.run_folder
    check_output(training, inputs)
    lock = lock_run(run)
    try:
        for aside in run.glob(f".*{SET_ASIDE}"):  # a process was killed while it replaced a run
            _put_back(run, aside)
        check_output(training, inputs)  # another process may have come first
        checkpoint = None
        if training.resume and has_begun(run):
            checkpoint, skipped = _checkpoint_to_resume(run, settings, fingerprints, training.allow_change)
            for refusal in skipped:
                print(f"skipped: {refusal.line()}", flush=True)
    except Refusal:
        lock.release()
        raise
    sweep(run)
    return lock, checkpoint


def _checkpoint_to_resume(
    run: Path, settings: RunSettings, fingerprints: dict[str, Any], allow_change: list[str]
) -> tuple[Path | None, list[Refusal]]:
    """The newest valid checkpoint, and why newer ones were skipped."""
    record = read_run(run, settings.kind)
    checkpoint, skipped = newest_valid(run)
    if checkpoint is None and skipped:
        raise Refusal(
            "K-NONE", "no checkpoint of this run is valid, and restarting at step 1 would replace them", file=run,
            found="; ".join(refusal.line() for refusal in skipped),
            fix="restore a copy of one, or choose another --output_dir; --overwrite True deletes this run",
        )  # fmt: skip
    facts = None
    if checkpoint is not None:
        facts = read_facts(checkpoint)
        check_seed(record, checkpoint, facts)
    _refuse_changes(run, changes(record, settings), facts, fingerprints, allow_change, settings)
    return checkpoint, skipped


def _refuse_changes(
    run: Path, changed: dict[str, tuple[Any, Any]], facts: dict[str, Any] | None, fingerprints: dict[str, Any],
    allow_change: list[str], settings: RunSettings,
) -> None:  # fmt: skip
    """Refuse settings that differ, and inputs that differ from the ``facts`` of a checkpoint, unless allowed."""
    unread = [] if facts is None else _changed_with(changed, settings)
    if facts is not None:
        changed |= {name: (facts.get(name), now) for name, now in fingerprints.items() if facts.get(name) != now}
    changed = {name: both for name, both in changed.items() if name not in allow_change}
    if changed:
        shown = {name: only_differing(*both) for name, both in changed.items()}
        more = [name for name in unread if name not in (*fingerprints, *allow_change)]
        raise Refusal(
            "K-CHANGED", "the settings differ from those of the run to resume", file=run, key=", ".join(changed),
            found="; ".join(f"{name} {now}" for name, (_, now) in shown.items()),
            expected="; ".join(f"{name} {then}" for name, (then, _) in shown.items()),
            fix=f"use the run's values, or --allow_change {' '.join([*changed, *more])}",
        )  # fmt: skip


def _changed_with(changed: Collection[str], settings: RunSettings) -> list[str]:
    """Fingerprints of data that differ too when these settings do: of ``data`` and ``validation`` those that it has."""
    if settings.kind != LLAVA:
        return []
    data = settings.data
    trained, validation = {*TOKENISED, "data_path", "validation_split", "data_share"}, {*TOKENISED, "validation_split"}
    if data.data_share < 1:  # the seed of the order draws it
        trained |= {"data_seed", "seed"} if settings.training_value("data_seed") is None else {"data_seed"}
    if data.validation_split:
        validation.add("data_path")
    if data.eval_data_path:
        validation.add("eval_data_path")
    return [
        *(["data"] if trained & set(changed) else []),
        *(["validation"] if (data.validation_split or data.eval_data_path) and validation & set(changed) else []),
    ]


def only_differing(then: object, now: object) -> tuple[object, object]:
    """Two values without their equal items, if they are mappings, such as file → hash."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return then, now
    names = [name for name in then | now if then.get(name) != now.get(name)]
    return {name: then.get(name, "missing") for name in names}, {name: now.get(name, "missing") for name in names}


def changes(then: RunRecord, now: RunSettings) -> dict[str, tuple[Any, Any]]:
    """Settings that affect the computation and differ: name → (then, now)."""
    both: dict[str, tuple[Any, Any]] = {name: (value, None) for name, value in then.unknown.items()}
    kind = KINDS[now.kind]
    for group, group_class in kind.groups.items():
        old, new = getattr(then, group), getattr(now, group)
        same = same_paths(located(old, then.folder), located(new, None))
        for name in (f.name for f in fields(group_class) if f.name not in kind.free[group] | same):
            both[name] = getattr(old, name), getattr(new, name)
    both |= {name: (then.training_value(name), now.training_value(name)) for name in TRAINING}
    if not (then.adapter.uses_dropout and now.adapter.uses_dropout):
        del both["dropout_masks"]  # none is drawn, before or from here on
    both["global_batch_size"] = then.global_batch_size, now.global_batch_size  # however it is split
    if now.kind == LLAVA and now.training_value("loss_average") == "micro_batch":  # there the split decides the loss
        name = "per_device_train_batch_size"
        both[name] = then.training_value(name), now.training_value(name)
    return {name: (old, new) for name, (old, new) in both.items() if old != new}


def write_first_files(
    training: TrainingSettings,
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerFast | None,
    report: Callable[[Path], object],
    inputs: Iterable[tuple[str, Path]] = (),
) -> None:
    """Write ``run.json``, the tokenizer and the data report into the folder that :func:`open_run` locked; when a run
    is resumed, only the first two, again.

    Args:
        tokenizer: None if the run has none.
        report: as for :func:`begin_run`. inputs: as for :func:`open_run`.

    Raises:
        Refusal: as :func:`check_output`: the folder may have changed since it was opened.
    """

    def record(run: Path) -> None:
        write_run(run, settings)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, run)

    run = training.run_folder
    if training.resume and has_begun(run):
        record(run)
        return
    check_output(training, inputs)
    begin_run(run, record, report)


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, run: Path) -> None:
    """Each file is the old or the new one, even if the disk is full: the run's export needs them."""
    with TemporaryDirectory(dir=run, prefix=".", suffix=".staging") as staging:
        tokenizer.save_pretrained(staging)
        (run / TOKENIZER).mkdir(exist_ok=True)
        for file in sorted(Path(staging).iterdir()):
            disk.fsync(file)
            os.replace(file, run / TOKENIZER / file.name)


def begin_run(run: Path, record: Callable[[Path], None], report: Callable[[Path], object]) -> None:
    """Write the first files of a new run into a locked folder, in place of the run that may be there.

    The old run is moved aside by renaming and deleted last. If this fails in between, it is moved back; after a kill,
    by the next process that opens the folder.

    Args:
        record: called with ``run``; writes the run's first files, ``run.json`` first.
        report: called first, with a folder to write the report about the data into. It reads images, and may refuse.
    """
    with TemporaryDirectory(dir=run, prefix=".", suffix=".staging") as staging:
        report(Path(staging) / DATA_REPORT)
        old = _set_aside(run)
        try:
            record(run)
            os.rename(Path(staging) / DATA_REPORT, run / DATA_REPORT)
        except BaseException:
            for path in files_of_run(run):
                disk.delete(path)
            _put_back(run, old)
            raise
    trash = old.with_suffix(".trash")
    os.rename(old, trash)
    disk.delete(trash)


def _set_aside(run: Path) -> Path:
    """Move the files of the run into a hidden folder in ``run``; the path of that folder."""
    aside = run / f".{secrets.token_hex(4)}{SET_ASIDE}"
    aside.mkdir()
    try:
        for path in sorted(files_of_run(run), key=lambda path: path.name == RUN):  # run.json last
            os.rename(path, aside / path.name)
    except BaseException:
        _put_back(run, aside)
        raise
    return aside


def check_space(run: Path, trained: int, checkpoints: int = 2) -> None:
    """Refuse to start a run whose first ``checkpoints`` checkpoints of ``trained`` parameters would not fit the disk.

    Raises:
        Refusal: E-DISK, with what is needed and what there is.
    """
    needed = checkpoints * checkpoint_bytes(trained)
    place = next(p for p in (run, *run.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise Refusal(
            "E-DISK", f"too little space for {checkpoints} checkpoints", file=run, key="--output_dir",
            found=f"{free:,} bytes free", fix="free space or choose another disk",
            expected=f"{needed:,} bytes: {checkpoints} checkpoints of {trained:,} trained parameters",
        )  # fmt: skip


def checkpoint_bytes(trained: int) -> int:
    """At most: master and two moments in float32 per trained parameter; names, logs and random states."""
    return round(12 * trained * 1.1) + 2**20


def check_shared(run: Path, patience: float = 15) -> None:
    """Check that every rank sees the folder that rank 0 created, into which all write a checkpoint. Collective.

    Raises:
        Refusal: C-SHARED on all ranks, if one does not see it (several hosts without a shared file system).
    """
    file = run / str(from_rank_0(f".seen-{secrets.token_hex(4)}"))
    if rank() == 0:
        file.touch()
    asked = time.monotonic()
    from_all_ranks(None)  # no rank looks before it is there
    while not (seen := file.exists()) and time.monotonic() < asked + patience:
        time.sleep(0.5)  # a network file system may return cached results
    without = [number for number, sees in enumerate(from_all_ranks(seen)) if not sees]
    if rank() == 0:
        file.unlink()
    if without:
        raise Refusal(
            "C-SHARED", "not every process sees this folder", file=run, key="--output_dir",
            found=f"nothing on ranks {', '.join(map(str, without))}",
            fix="choose a folder on a file system that all hosts share",
        )  # fmt: skip


def _put_back(run: Path, aside: Path) -> None:
    for path in sorted(aside.iterdir(), key=lambda path: path.name != RUN):
        if (run / path.name).exists():  # the new run's
            disk.delete(run / path.name)
        os.rename(path, run / path.name)
    aside.rmdir()
