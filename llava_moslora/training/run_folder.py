"""Opening ``--output_dir``: a new run, or the old run where it stopped, and never a mixture.

Nothing of a run is touched before everything else has been checked, and a run that is replaced is set aside first and
deleted last.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

from llava_moslora.distributed import from_all_ranks, from_rank_0, rank
from llava_moslora.errors import Refusal
from llava_moslora.files import disk
from llava_moslora.files.manifest import read_facts
from llava_moslora.files.publish import sweep
from llava_moslora.runs.checkpoints import lock_run, newest_valid
from llava_moslora.runs.record import RUN, check_seed, read_run
from llava_moslora.training.output_dir import DATA_REPORT, check_output, has_begun, of_a_run

ASIDE = ".aside"  # of folders that a replaced run waits in

# What may differ between a run and its continuation: where things are written, how fast, how often; and where the parts
# lie, because the fingerprints say what they are.
FREE = {
    "data": {"data_cache", "preprocessing_num_workers", "decode_images"},
    "model": {"model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter"},
    "adapter": set(),
}
# What runs did that were begun before there was a flag for it.
BEFORE = {"attn_implementation": "sdpa", "dropout_masks": "cpu generator"}
# Of the Trainer's many settings, those that change what is computed.
TRAINING = (
    *("learning_rate", "vision_lr", "mm_projector_lr", "mixer_lr", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("loss_average", "packing", "seed", "data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha"),
    *("use_liger_kernel", "torch_compile", "tf32", "full_determinism", "dropout_masks"),
)


def open_run(run: Path, *, overwrite: bool, inputs: Iterable[tuple[str, Path]] = ()) -> FileLock:
    """The locked folder of a run that may begin there (:func:`begin_run`); nothing is deleted yet.

    Raises:
        Refusal: as :func:`check_output`; the folder is in use.
    """
    check_output(run, resume=False, overwrite=overwrite, inputs=inputs)
    lock = _lock(run)
    try:
        check_output(run, resume=False, overwrite=overwrite, inputs=inputs)  # another process may have been faster
    except Refusal:
        lock.release()
        raise
    sweep(run)
    return lock


def reopen_run(
    run: Path, settings: dict, facts: dict, allow_change: list[str], inputs: Iterable[tuple[str, Path]] = ()
) -> tuple[FileLock, Path | None]:
    """The locked folder of a run that may have begun, and the newest valid checkpoint to go on from (None: begin).

    Args:
        settings: of this call, as :func:`llava_moslora.runs.record.write_run` records them.
        facts: fingerprints of this call's inputs, as every checkpoint's manifest states them.
        allow_change: names of settings or facts that may differ from the run's.
        inputs: as for :func:`check_output`.

    Raises:
        Refusal: settings or inputs differ from the run's and the difference is not allowed; there are checkpoints and
            none of them is valid (K-NONE), or the newest is not this run's own; the folder is in use, or holds
            something that is no run. Nothing in the folder has changed then.
    """
    check_output(run, resume=True, overwrite=False, inputs=inputs)
    lock = _lock(run)
    try:
        checkpoint = _checkpoint_to_resume(run, settings, facts, allow_change) if has_begun(run) else None
    except Refusal:
        lock.release()
        raise
    sweep(run)
    return lock, checkpoint


def _checkpoint_to_resume(run: Path, settings: dict, facts: dict, allow_change: list[str]) -> Path | None:
    record = read_run(run)
    checkpoint, skipped = newest_valid(run)
    if checkpoint is None and skipped:
        raise Refusal(
            "K-NONE", "no checkpoint of this run is valid, and beginning at step 1 would replace them", file=run,
            found="; ".join(refusal.line() for refusal in skipped),
            fix="put a copy of one back, or choose another --output_dir; --overwrite True deletes this run",
        )  # fmt: skip
    for refusal in skipped:
        print(f"skipped: {refusal.line()}", flush=True)
    changed = changes(record["settings"], settings)
    if checkpoint is not None:
        manifest = read_facts(checkpoint)
        check_seed(record, checkpoint, manifest)
        changed |= {name: (manifest.get(name), now) for name, now in facts.items() if manifest.get(name) != now}
    changed = {name: both for name, both in changed.items() if name not in allow_change}
    if changed:
        shown = {name: only_differing(*both) for name, both in changed.items()}
        raise Refusal(
            "K-CHANGED",
            "this call differs from the run that it would resume",
            file=run,
            key=", ".join(changed),
            found="; ".join(f"{name} {now}" for name, (_, now) in shown.items()),
            expected="; ".join(f"{name} {then}" for name, (then, _) in shown.items()),
            fix=f"give the run's own values, or --allow_change {' '.join(changed)}",
        )
    return checkpoint


def only_differing(then: object, now: object) -> tuple[object, object]:
    """Of two mappings, such as the files of a folder and their hashes, what differs."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return then, now
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return tuple({name: side.get(name, "missing") for name in names} for side in (then, now))


def changes(then: dict, now: dict) -> dict[str, tuple[object, object]]:
    """Settings that decide what is computed and differ: name → (then, now)."""
    differing = {}
    for group, free in FREE.items():
        for name in then[group].keys() | now[group].keys():
            both = then[group].get(name, BEFORE.get(name)), now[group].get(name)
            if name not in free and both[0] != both[1]:
                differing[name] = both
    for name in TRAINING:
        both = tuple(settings["training"].get(name, BEFORE.get(name)) for settings in (then, now))
        if both[0] != both[1]:
            differing[name] = both
    batches = then.get("global_batch_size"), now["global_batch_size"]
    if batches[0] != batches[1]:  # its split over ranks and accumulation is free
        differing["global_batch_size"] = batches
    return differing


def begin_run(run: Path, record: Callable[[Path], None], report: Path) -> None:
    """Put the first files of a new run into a locked folder, in place of the run that may be there.

    The old run is set aside by renaming and deleted last; if this fails in between, it is put back, also after a kill,
    by whoever opens the folder next.

    Args:
        record: called with ``run``; writes what is known of the run, ``run.json`` first.
        report: the finished report about the data, on the same disk; moved into ``run``.
    """
    aside = run / f".{secrets.token_hex(4)}{ASIDE}"
    aside.mkdir()
    try:
        for path in sorted(of_a_run(run), key=lambda path: path.name == RUN):  # as long as it is there, it is a run
            os.rename(path, aside / path.name)
    except BaseException:
        _put_back(run, aside)
        raise
    try:
        record(run)
        os.rename(report, run / DATA_REPORT)
    except BaseException:
        for path in of_a_run(run):
            disk.delete(path)
        _put_back(run, aside)
        raise
    trash = aside.with_suffix(".trash")
    os.rename(aside, trash)
    disk.delete(trash)


def check_space(run: Path, trained: int, checkpoints: int = 2) -> None:
    """Refuse to start a run whose first ``checkpoints`` checkpoints of ``trained`` parameters would not fit the disk.

    Raises:
        Refusal: E-DISK, with what is needed and what there is.
    """
    needed = checkpoints * checkpoint_bytes(trained)
    place = next(p for p in (run, *run.absolute().parents) if p.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise Refusal(
            "E-DISK",
            f"too little space for {checkpoints} checkpoints",
            file=run,
            key="--output_dir",
            found=f"{free:,} bytes free",
            expected=f"{needed:,} bytes: {checkpoints} checkpoints of {trained:,} trained parameters",
            fix="free space or choose another disk",
        )


def checkpoint_bytes(trained: int) -> int:
    """At most: master and two moments in float32 per trained parameter, names, logs and random streams beside them."""
    return round(12 * trained * 1.1) + 2**20


def check_shared(run: Path, patience: float = 15) -> None:
    """Every rank must see the folder that rank 0 made: the ranks write their parts of a checkpoint into it. Collective.

    Raises:
        Refusal: C-SHARED on all ranks, where one does not see it (several hosts without a common file system).
    """
    name = from_rank_0(f".seen-{secrets.token_hex(4)}")
    if rank() == 0:
        (run / name).touch()
    asked = time.monotonic()
    from_all_ranks(None)  # nobody looks before it is there
    while not (seen := (run / name).exists()) and time.monotonic() < asked + patience:
        time.sleep(0.5)  # a network file system may answer from its cache
    blind = [number for number, sees in enumerate(from_all_ranks(seen)) if not sees]
    if rank() == 0:
        (run / name).unlink()
    if blind:
        raise Refusal(
            "C-SHARED",
            "not every process sees this folder",
            file=run,
            key="--output_dir",
            found=f"nothing on ranks {', '.join(map(str, blind))}",
            fix="choose a folder on a file system that all hosts share",
        )


def _lock(run: Path) -> FileLock:
    lock = lock_run(run)
    for aside in run.glob(f".*{ASIDE}"):  # a process was killed while it replaced a run
        _put_back(run, aside)
    return lock


def _put_back(run: Path, aside: Path) -> None:
    for path in sorted(aside.iterdir(), key=lambda path: path.name != RUN):
        if (run / path.name).exists():  # the new run's
            disk.delete(run / path.name)
        os.rename(path, run / path.name)
    aside.rmdir()
