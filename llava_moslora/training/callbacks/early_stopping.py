"""Early stopping: the run ends when its evaluations no longer improve.

Transformers' own callback keeps a counter, which a resumed run would reset. Here it is computed from the log of
evaluations, which every checkpoint contains.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import SaveStrategy


class EarlyStopping(TrainerCallback):
    """Ends the run after ``patience`` evaluations in a row that do not improve on the best before them by more than
    ``threshold``; the last step is saved, and a line says why it ended. An evaluation before the first step does not
    count.

    The metric is ``metric_for_best_model``, better as ``greater_is_better`` says.
    """

    def __init__(self, patience: int, threshold: float):
        self.patience, self.threshold = patience, threshold

    def on_train_begin(self, args, state, control, **_):
        self._stop_if_due(args, state, control)  # a run that stopped is resumed

    def on_evaluate(self, args, state, control, **_):
        if self._stop_if_due(args, state, control):
            control.should_save |= args.save_strategy != SaveStrategy.NO

    def on_train_end(self, args, state, control, **_):
        if state.is_world_process_zero and state.global_step < state.max_steps and self._is_due(args, state):
            print(f"stopped early at step {state.global_step} of {state.max_steps}: no better "
                  f"{_metric(args)} in {self.patience} evaluation{'s' * (self.patience > 1)}", flush=True)  # fmt: skip

    def _stop_if_due(self, args, state: TrainerState, control) -> bool:
        due = self._is_due(args, state)
        control.should_training_stop |= due
        return due

    def _is_due(self, args, state: TrainerState) -> bool:
        name = _metric(args)
        values = [row[name] for row in state.log_history if name in row and row["step"] > 0]
        return without_improvement(values, args.greater_is_better, self.threshold) >= self.patience


def _metric(args) -> str:
    return f"eval_{args.metric_for_best_model}"


def without_improvement(values: Sequence[float], greater_is_better: bool, threshold: float) -> int:
    """How many of the last values in a row did not improve, as transformers counts them."""
    best, count = None, 0
    for value in values:
        better = best is None or (value > best if greater_is_better else value < best)
        count = 0 if best is None or (better and abs(value - best) > threshold) else count + 1
        best = value if better else best
    return count
