"""Opening ``--output_dir``: a new run in an empty folder, or the old run where it stopped, and never a mixture."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

from filelock import FileLock

from llava_moslora.errors import Refusal
from llava_moslora.runs import publish
from llava_moslora.runs.manifest import stated
from llava_moslora.runs.record import RUN, read_run

# What may differ between a run and its continuation: where things are written, how fast, how often.
FREE = {
    "data": {"data_cache", "preprocessing_num_workers", "decode_images"},
    "model": set(),
    "adapter": set(),
}
# What runs did that were begun before there was a flag for it.
BEFORE = {"attn_implementation": "sdpa"}
# Of the Trainer's many settings, those that change what is computed.
TRAINING = (
    *("learning_rate", "vision_lr", "mm_projector_lr", "mixer_lr", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "num_train_epochs", "max_steps"),
    *("loss_average", "packing", "seed", "data_seed", "bf16", "fp16", "label_smoothing_factor", "neftune_noise_alpha"),
    *("use_liger_kernel", "torch_compile", "tf32", "full_determinism"),
)


def check_output(run: Path, *, resume: bool, overwrite: bool) -> None:
    """What :func:`open_run` and :func:`reopen_run` would refuse of the folder itself, before anything is loaded.

    Raises:
        Refusal: C-OUTPUT, it is no folder, cannot be written to, or holds something that is neither to be gone on with
            nor to be deleted.
    """
    if run.exists() and not run.is_dir():
        raise Refusal("C-OUTPUT", "not a folder", file=run, key="--output_dir", fix="choose another path")
    place = next(p for p in (run, *run.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise Refusal(
            "C-OUTPUT", "cannot be written to", file=place, key="--output_dir", fix="choose another path, or its rights"
        )
    present = _content(run) if run.is_dir() else []
    if not present:
        return
    if not (resume or overwrite):
        raise Refusal(
            "C-OUTPUT",
            "the folder is not empty",
            file=run,
            key="--output_dir",
            found=", ".join(sorted(p.name for p in present)[:5]),
            fix="--resume True to go on with this run, --overwrite True to delete it, or another folder",
        )
    if not (run / RUN).is_file():
        raise Refusal(
            "C-OUTPUT", "not a run: nothing to resume" if resume else "not a run: nothing is deleted here", file=run,
            key="--output_dir", found=", ".join(sorted(p.name for p in present)[:5]), expected=f"{RUN} in it",
            fix="choose another folder",
        )  # fmt: skip


def open_run(run: Path, *, overwrite: bool) -> FileLock:
    """An empty, locked run folder; with ``overwrite``, the run in it is deleted, and never anything but a run.

    Raises:
        Refusal: as :func:`check_output`; the folder is in use.
    """
    check_output(run, resume=False, overwrite=overwrite)
    lock = publish.lock_run(run)
    for path in _content(run):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return lock


def reopen_run(run: Path, settings: dict, facts: dict, allow_change: list[str]) -> tuple[FileLock, Path | None]:
    """The locked folder of a run that may have begun, and the newest valid checkpoint to go on from (None: begin).

    Args:
        settings: of this call, as :func:`llava_moslora.runs.record.write_run` records them.
        facts: fingerprints of this call's inputs, as every checkpoint's manifest states them.
        allow_change: names of settings or facts that may differ from the run's.

    Raises:
        Refusal: settings or inputs differ from the run's and the difference is not allowed; the folder is in use, or
            holds something that is no run.
    """
    check_output(run, resume=True, overwrite=False)
    lock = publish.lock_run(run)
    publish.sweep(run)
    if not _content(run):
        return lock, None
    checkpoint, passed_over = publish.newest_valid(run)
    for refusal in passed_over:
        print(f"passed over: {refusal.line()}", flush=True)
    changed = changes(read_run(run)["settings"], settings)
    if checkpoint is not None:
        manifest = stated(checkpoint)
        changed |= {name: (manifest.get(name), now) for name, now in facts.items() if manifest.get(name) != now}
    changed = {name: both for name, both in changed.items() if name not in allow_change}
    if changed:
        lock.release()
        raise Refusal(
            "K-CHANGED",
            "this call differs from the run that it would resume",
            file=run,
            key=", ".join(changed),
            found="; ".join(f"{name} {now}" for name, (_, now) in changed.items()),
            expected="; ".join(f"{name} {then}" for name, (then, _) in changed.items()),
            fix=f"give the run's own values, or --allow_change {' '.join(changed)}",
        )
    return lock, checkpoint


def changes(then: dict, now: dict) -> dict[str, tuple[object, object]]:
    """Settings that decide what is computed and differ: name → (then, now)."""
    differing = {}
    for group, free in FREE.items():
        for name in then[group].keys() | now[group].keys():
            both = then[group].get(name, BEFORE.get(name)), now[group].get(name)
            if name not in free and both[0] != both[1]:
                differing[name] = both
    for name in TRAINING:
        if then["training"].get(name) != now["training"].get(name):
            differing[name] = (then["training"].get(name), now["training"].get(name))
    if then["global_batch_size"] != now["global_batch_size"]:  # its split over ranks and accumulation is free
        differing["global_batch_size"] = (then["global_batch_size"], now["global_batch_size"])
    return differing


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
    name = publish.from_rank_0(f".seen-{secrets.token_hex(4)}")
    if publish.rank() == 0:
        (run / name).touch()
    asked = time.monotonic()
    publish.from_all_ranks(None)  # nobody looks before it is there
    while not (seen := (run / name).exists()) and time.monotonic() < asked + patience:
        time.sleep(0.5)  # a network file system may answer from its cache
    blind = [rank for rank, sees in enumerate(publish.from_all_ranks(seen)) if not sees]
    if publish.rank() == 0:
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


def _content(run: Path) -> list[Path]:
    """What is in the folder, but for the lock and for files that a killed life had not finished."""
    return [p for p in run.iterdir() if not p.name.startswith(".")]
