"""Evaluations of a run on its validation data: loss and token accuracy, over tokens as in training.

The Trainer's own evaluation loop averages the losses of batches with different numbers of labelled tokens, and
pads the last batch of a rank with records that other ranks have too. Here every record counts exactly once on any
number of ranks. Every rank computes the same number of batches, because ZeRO-3 gathers parameters by collectives:
a rank that has no record left recomputes another one, which does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm
from transformers import TrainerState

from llava_moslora.data.collate import Collator
from llava_moslora.data.loader import TrainDataLoader
from llava_moslora.data.split import ValidationData
from llava_moslora.distributed import rank, world_size
from llava_moslora.errors import Refusal
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.callbacks.preemption import ignore_signals

FIGURES = ("loss", "token_accuracy")  # of each set: eval_NAME_loss, …, and of all records together: eval_loss, …


class Batch(NamedTuple):
    set_number: int
    rows: list[int]
    counted: bool  # False: computed only because other ranks compute a batch


class EvaluationBatches:
    """The batches of one rank, as a batch sampler: every record of every set on exactly one rank, the longest first.

    Args:
        sets: int64[n] each, rows of a data set.
        lengths: tokens per row of the data set.
        batch_size: records per rank and batch.
    """

    def __init__(self, sets: list[np.ndarray], lengths: np.ndarray, *, batch_size: int, world_size: int, rank: int):
        self.batches: list[Batch] = []
        for number, rows in enumerate(sets):
            rows = rows[np.argsort(-lengths[rows], kind="stable")]
            for start in range(0, len(rows), batch_size * world_size):
                share = rows[start : start + batch_size * world_size]
                mine = share[rank::world_size].tolist()
                self.batches.append(Batch(number, mine or share[:1].tolist(), bool(mine)))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return (batch.rows for batch in self.batches)


class Validation:
    """The validation data of a run, and its evaluation.

    Args:
        collator: the training's; it packs records as there.
    """

    def __init__(self, data: ValidationData, collator: Collator, args: TrainingArguments):
        self.names, self.args = list(data.sets), args
        lengths = np.asarray(data.dataset["length"][:])
        assert args.per_device_eval_batch_size is not None, "filled in with the flags"
        self.plan = EvaluationBatches(
            list(data.sets.values()), lengths,
            batch_size=args.per_device_eval_batch_size, world_size=world_size(), rank=rank(),
        )  # fmt: skip
        self.loader = TrainDataLoader(
            data.dataset,
            self.plan,
            collator,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=False,  # between evaluations they would only take memory
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
        )

    def evaluate(
        self, model: nn.Module, prepare: Callable[[dict], dict[str, Any]], before_batch: Callable[[], object]
    ) -> dict[str, float]:
        """``eval_loss`` and ``eval_token_accuracy`` over the trained tokens of all sets, and of several sets also
        ``eval_NAME_…`` of each. Collective. No gradient is computed; the caller sets the eval mode.

        Args:
            model: the wrapped model, such as a DeepSpeed engine.
            prepare: moves a batch to the device.
            before_batch: an exception it raises ends the evaluation.

        Raises:
            Refusal: as the data loader; R-NONFINITE, a loss that is NaN or Inf.
        """
        sums: Tensor | None = None  # float64[sets, 3]: loss, correct tokens, tokens
        bar = tqdm(total=len(self.plan), unit="batch", desc="evaluating", leave=False,
                   disable=self.args.disable_tqdm or rank() > 0)  # fmt: skip
        try:
            with torch.no_grad(), bar:
                for number, batch in zip(self.plan.batches, self.loader, strict=True):
                    before_batch()
                    del batch["record"], batch["lengths"]
                    tokens = len(batch["label_positions"])
                    out = model(**prepare(batch), num_items_in_batch=1)
                    if sums is None:
                        sums = torch.zeros(len(self.names), 3, dtype=torch.float64, device=out.loss.device)
                    if number.counted:
                        counts = torch.stack([out.loss.double(), out.correct.double()])
                        sums[number.set_number, :2] += counts  # stays on the device, no synchronisation
                        sums[number.set_number, 2] += tokens
                    bar.update()
        finally:
            self.loader.close()
        assert sums is not None, "a set has records"
        if world_size() > 1:
            distributed.all_reduce(sums)
        return self._metrics(sums.cpu())

    def _metrics(self, sums: Tensor) -> dict[str, float]:
        metrics: dict[str, float] = {}
        several = len(self.names) > 1
        rows = [("", sums.sum(0)), *((f"{name}_", row) for name, row in zip(self.names, sums, strict=True) if several)]
        for prefix, row in rows:
            loss, correct, tokens = row.tolist()
            for figure, value in zip(FIGURES, (loss / tokens, correct / tokens), strict=True):
                metrics[f"eval_{prefix}{figure}"] = value
        if broken := [name for name, row in zip(self.names, sums, strict=True) if not math.isfinite(float(row[0]))]:
            raise Refusal(
                "R-NONFINITE", "the validation loss became NaN or Inf", found=", ".join(broken),
                expected="a finite loss", fix="inspect these records, lower --learning_rate, or train in bf16",
            )  # fmt: skip
        return metrics


def is_due(args: TrainingArguments, state: TrainerState, steps_per_epoch: int) -> bool:
    """Whether the Trainer evaluates after the current step of ``state`` (as its DefaultFlowCallback decides)."""
    step, strategy = state.global_step, str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if step == 0 or strategy == "no":
        return False
    every = state.eval_steps if strategy == "steps" else steps_per_epoch
    delayed = args.eval_delay > (step if strategy == "steps" else step / steps_per_epoch)
    return not delayed and (step % every == 0 or step == state.max_steps)


def evaluation_at(state: TrainerState, step: int) -> dict[str, float] | None:
    """Loss and token accuracy at ``step``, if it has been evaluated."""
    rows = (row for row in state.log_history if row["step"] == step and "eval_loss" in row)
    return next(({k: v for k, v in row.items() if k.startswith("eval_") and k.endswith(FIGURES)} for row in rows), None)


def validation_facts(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Validation entries of a checkpoint's manifest: ``metrics`` of this step if it was evaluated, and ``best``, the
    best of the run's checkpoints so far."""
    facts: dict[str, Any] = {}
    if metrics := evaluation_at(state, state.global_step):
        facts["metrics"] = metrics
    if state.best_global_step:
        metric = f"eval_{args.metric_for_best_model}"
        facts["best"] = {"step": state.best_global_step, "metric": metric, "value": state.best_metric}
    return facts
