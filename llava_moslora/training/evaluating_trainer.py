"""Hugging Face's Trainer with this package's evaluations: when they run, and which checkpoint is the best."""

from __future__ import annotations

import time
from dataclasses import replace

from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import SaveStrategy

from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.data.split import ValidationData
from llava_moslora.distributed import rank
from llava_moslora.files.manifest import add_facts
from llava_moslora.runs.checkpoints import checkpoint_of
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.callbacks.preemption import EvaluationInterrupted
from llava_moslora.training.eval_mode import eval_mode
from llava_moslora.training.nonfinite import FiniteCheck
from llava_moslora.training.throughput import Throughput
from llava_moslora.training.validation import Validation, evaluation_at, is_due, validation_facts
from llava_moslora.training.watchdog import Watchdog


class EvaluatingTrainer(Trainer):
    """The part of :class:`~llava_moslora.training.trainer.MosLoraTrainer` that evaluates.

    Args:
        eval_dataset: the validation data, if any.
    """

    args: TrainingArguments
    control: TrainerControl
    finite_check: FiniteCheck
    sampler: GlobalBatchSampler
    throughput: Throughput
    watchdog: Watchdog

    def __init__(self, *args, eval_dataset: ValidationData | None = None, **kwargs):
        super().__init__(*args, eval_dataset=eval_dataset, **kwargs)
        self.validation = None
        if eval_dataset is not None:
            collator = replace(self.data_collator, data_files=eval_dataset.files)
            self.validation = Validation(eval_dataset, collator, self.args)
        self.saved_step: int | None = None  # of the newest checkpoint

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss and token accuracy of the validation data (:mod:`llava_moslora.training.validation`), which are logged.

        Training is not affected: random states, modes and gradients stay as they were.
        """
        assert self.validation is not None and eval_dataset is None, "validation data are given to the constructor"

        def before_batch() -> None:
            self.watchdog.report_progress()
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        self.finite_check.settle()
        began = time.monotonic()
        with eval_mode(self.model):
            metrics = self.validation.evaluate(self.model_wrapped, self._prepare_inputs, before_batch)
        seconds = time.monotonic() - began
        self.throughput.since += seconds  # they do not count as training time
        self.log(metrics | {"eval_runtime": round(seconds, 3)})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False) -> dict[str, float]:
        """As the Trainer's, but at most once per step, and without a result if a signal ends it. Before the first step
        (``skip_scheduler``) :class:`EvaluateFirst` has already evaluated."""
        self.control.should_evaluate = False
        if skip_scheduler or evaluation_at(self.state, self.state.global_step):
            return {}
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationInterrupted:
            return {}

    def _determine_best_metric(self, metrics, trial) -> bool:
        """As the Trainer's, but only among steps that have a checkpoint. If this step's was published before it was
        evaluated, its manifest is completed here."""
        published = self.saved_step == self.state.global_step
        saves = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        if not metrics or not (published or saves):
            return self.control.should_save
        is_best = super()._determine_best_metric(metrics, trial)
        if published and rank() == 0:
            folder = checkpoint_of(self.args.run_folder, self.state.global_step)
            add_facts(folder, validation_facts(self.args, self.state))
        return is_best or self.control.should_save  # early stopping and signals save a step that is not the best

    def _compare_with_best(self) -> None:
        """To be called before a checkpoint is written. With --save_strategy epoch the last step of an epoch is
        evaluated first, as a step, and saved later, at the end of the epoch: it may be the best too."""
        if metrics := evaluation_at(self.state, self.state.global_step):
            super()._determine_best_metric(metrics, None)

    def evaluate_first(self) -> None:
        """Before the first step: the evaluation of ``--eval_on_start``, or the one that a signal interrupted at the
        step from which the run is resumed."""
        self.state.compute_steps(self.args, self.state.max_steps)
        if self.state.global_step == 0 and self.args.eval_on_start:
            self._evaluate(None, None)
        elif is_due(self.args, self.state, self.sampler.global_batches):
            self._determine_best_metric(self._evaluate(None, None), None)


class EvaluateFirst(TrainerCallback):
    """Calls :meth:`EvaluatingTrainer.evaluate_first`; the last callback, so that the others show the result."""

    def __init__(self, trainer: EvaluatingTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        self.trainer.evaluate_first()
