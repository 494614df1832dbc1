"""Validation losses by a plain PyTorch loop, to compare a run's with."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from llava_moslora.config import DataSettings
from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.prepare import prepare
from llava_moslora.data.split import validation_data
from llava_moslora.inference.load import load_run
from llava_moslora.models.towers import tokens_per_image
from llava_moslora.models.vision import read_image_settings, read_vision_config
from llava_moslora.runs.record import read_run
from support.training_runs import rows, stock_model

BOUND = 5e-6  # relative, of a loss in float32: sums in another order


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    """Step → its loss and token accuracy, as logged."""
    kept = (row for row in rows(run) if "eval_loss" in row)
    return {row["step"]: {k: v for k, v in row.items() if k.endswith(("loss", "accuracy"))} for row in kept}


def reference(run: Path, parts, checkpoint: Path | None) -> dict[str, dict[str, float]]:
    """Set → ``loss`` and ``token_accuracy`` of its records, one by one, from all logits of the stock forward.

    Args:
        checkpoint: None: the model before the first step.
    """
    settings, tower = read_run(run).data, parts.clip
    loaded = load_run(run, checkpoint=checkpoint) if checkpoint else None
    model = stock_model(parts) if loaded is None else loaded.model
    tokenizer = load_run(run, trained=False).tokenizer if loaded is None else loaded.tokenizer
    tokens = tokens_per_image(read_vision_config(str(tower)))

    def prepared(settings: DataSettings):
        return prepare(settings, tokenizer=tokenizer, template="chatml", tokens_per_image=tokens)

    _, validation, _ = validation_data(prepared(settings), settings, prepared)
    transform = ImageTransform.from_settings(read_image_settings(str(tower)), settings)
    collate = Collator.of(settings, tokenizer, transform)
    sums = {
        name: _sums(model, collate, (validation.dataset[int(k)] for k in chosen))
        for name, chosen in validation.sets.items()
    }
    sums[""] = np.sum(list(sums.values()), axis=0)
    return {name: {"loss": s[0] / s[2], "token_accuracy": s[1] / s[2]} for name, s in sums.items()}


@torch.no_grad()
def _sums(model, collate: Collator, records: Iterable[dict]) -> np.ndarray:
    """Loss, correct tokens, tokens."""
    total = np.zeros(3)
    for record in records:
        batch = collate([record])
        inputs = {name: batch[name] for name in ("input_ids", "pixel_values") if name in batch}
        logits, labels = model(**inputs).logits[0, :-1].double(), batch["labels"][0, 1:]  # (T-1, V), (T-1)
        kept = labels != -100
        loss = F.cross_entropy(logits[kept], labels[kept], reduction="sum")
        total += [float(loss), float((logits[kept].argmax(-1) == labels[kept]).sum()), float(kept.sum())]
    return total


def write_uneven(folder: Path, parts, records: int = 5) -> Path:
    """Some of the training records with other answers: text and images, of several lengths."""
    chosen = json.loads(parts.data.read_text())[:records]
    for number, record in enumerate(chosen):
        record["conversations"][-1]["value"] = "yes the square is red " * (1 + number)
    file = folder / "held_out.json"
    file.write_text(json.dumps(chosen))
    return file


def kill_in_evaluation(*, evaluation: int, batch: int) -> None:
    """A hook for :mod:`support.warm_server`: dies in an evaluation (from 0) before a batch, or with a large number when
    it has ended and nothing is saved yet."""
    from llava_moslora.training.evaluating_trainer import EvaluatingTrainer
    from llava_moslora.training.validation import Validation

    seen = {"evaluations": -1, "batches": 0}
    evaluate, log = Validation.evaluate, EvaluatingTrainer.evaluate

    def dies(self, model, prepare, before_batch):
        seen["evaluations"] += 1
        seen["batches"] = 0

        def before() -> None:
            if seen["evaluations"] == evaluation and seen["batches"] == batch:
                os.kill(os.getpid(), signal.SIGKILL)
            seen["batches"] += 1
            before_batch()

        return evaluate(self, model, prepare, before)

    def dies_after(self, *args, **named):
        metrics = log(self, *args, **named)
        if seen["evaluations"] == evaluation:
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics

    Validation.evaluate, EvaluatingTrainer.evaluate = dies, dies_after
