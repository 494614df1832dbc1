"""Experiment trackers (``--report_to wandb mlflow trackio``): one tracker run per run folder, also after a resume.

transformers' integrations log every row of ``metrics.jsonl`` and the Trainer's arguments. This module starts the
trackers before the first step, adds the run's other settings, and saves the id with which a resumed run continues its
tracker run, in ``trackers.json`` in the run folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import MLflowCallback, TrackioCallback, WandbCallback
from transformers.trainer import Trainer

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json, replace_json
from llava_moslora.runs.record import read_run

TRACKERS_FILE = "trackers.json"
CALLBACKS = {"wandb": WandbCallback, "mlflow": MLflowCallback, "trackio": TrackioCallback}
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow would send telemetry on import
LONGEST_TAG = 5000  # characters, of MLflow's tags
FIXES = {
    "wandb": "wandb login, or WANDB_MODE=offline in the environment",
    "mlflow": "set MLFLOW_TRACKING_URI to a server or a store that this machine can write to",
    "trackio": "check that its folder (TRACKIO_DIR) can be written to",
}


def start_trackers(trainer: Trainer, run: Path) -> None:
    """Start the trackers of ``trainer`` on the main process, before its training begins.

    Args:
        run: the run folder, whose ``run.json`` is written.

    Raises:
        Refusal: E-TRACKER, a tracker cannot be started.
    """
    if not trainer.state.is_world_process_zero:
        return
    file = run / TRACKERS_FILE
    names = read_json(file) if file.is_file() else {}
    callbacks = trainer.callback_handler.callbacks
    for tracker, callback in [(t, c) for t, kind in CALLBACKS.items() for c in callbacks if type(c) is kind]:
        try:
            names[tracker] = STARTS[tracker](trainer, callback, names.get(tracker), _settings(run))
        except Exception as error:  # each library raises its own exception types, and some of other libraries
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
            key = f"--report_to {tracker}"
            raise Refusal("E-TRACKER", "cannot be started", key=key, found=found, fix=FIXES[tracker]) from error
        replace_json(file, names)


def _settings(run: Path) -> dict[str, Any]:
    """The settings of ``run.json`` that are not among the Trainer's arguments: ``adapter.lora_r`` → 64."""
    record = read_run(run, None)
    groups: dict[str, Any] = {"model": record.model, "data": record.data, "adapter": record.adapter}
    return {f"{name}.{key}": value for name, group in groups.items() for key, value in asdict(group).items()}


def _start_wandb(trainer: Trainer, callback: WandbCallback, known: str | None, settings: dict[str, Any]) -> str:
    import wandb

    if known is not None and "WANDB_RUN_ID" not in os.environ:
        wandb.init(project=os.getenv("WANDB_PROJECT", "huggingface"), id=known, resume="allow")
    callback.setup(trainer.args, trainer.state, trainer.model)
    wandb.run.config.update(settings, allow_val_change=True)
    return wandb.run.id


def _start_mlflow(trainer: Trainer, callback: MLflowCallback, known: str | None, settings: dict[str, Any]) -> str:
    import mlflow

    if known is not None:
        os.environ.setdefault("MLFLOW_RUN_ID", known)
        os.environ.setdefault("MLFLOW_MAX_LOG_PARAMS", "0")  # they are there, and MLflow refuses other values
    callback.setup(trainer.args, trainer.state, trainer.model)
    # As tags, which can be changed: a resumed run may have another data cache, for example.
    mlflow.set_tags({name: str(value)[:LONGEST_TAG] for name, value in settings.items()})
    return mlflow.active_run().info.run_id


def _start_trackio(trainer: Trainer, callback: TrackioCallback, known: str | None, settings: dict[str, Any]) -> str:
    import trackio

    trainer.args.run_name = known or trainer.args.run_name  # a run of the same name in the same project is continued
    callback.setup(trainer.args, trainer.state, trainer.model)
    trackio.config.update(settings)
    return trackio.context_vars.current_run.get().name


STARTS: dict[str, Callable[..., str]] = {"wandb": _start_wandb, "mlflow": _start_mlflow, "trackio": _start_trackio}
