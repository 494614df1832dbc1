"""The validation flags: defaults, and invalid combinations, before any data is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_moslora.config import DataSettings
from llava_moslora.data.split import set_names
from llava_moslora.errors import Refusal, unknown_value

# ``args`` below are llava_moslora.training.arguments.TrainingArguments, which use this file.

EVAL_STEPS = 500  # without --save_steps to follow
# Flag → its default. They have no effect without --eval_strategy.
NEED_EVALUATION: dict[str, Any] = {
    "eval_steps": None,
    "eval_delay": 0,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "early_stopping_patience": None,
}
HOW = "--eval_strategy steps or epoch, with --validation_split 0.01 or --eval_data_path FILE"
METRICS = ("loss", "token_accuracy")  # of every validation set, and of all together


def resolve_evaluation(args: Any) -> None:
    """Fill in defaults, and refuse in one line what transformers refuses in several.

    Raises:
        Refusal: C-FLAG.
    """
    evaluates, saves = _name(args.eval_strategy), _name(args.save_strategy)
    if args.per_device_eval_batch_size is None:
        args.per_device_eval_batch_size = args.per_device_train_batch_size
    if args.early_stopping_patience is None and args.early_stopping_threshold:
        raise _refusal("early_stopping_threshold", args, "needs --early_stopping_patience", "give both")
    if evaluates == "no":
        for name, default in NEED_EVALUATION.items():
            if getattr(args, name) != default:
                raise _refusal(name, args, "needs evaluations, and --eval_strategy is no", HOW)
        if saves == "best":
            raise _refusal("save_strategy", args, "there is no best checkpoint without evaluations", HOW)
        return
    if evaluates == "epoch" and args.eval_steps is not None:
        raise _refusal("eval_steps", args, "has no effect with --eval_strategy epoch", "--eval_strategy steps")
    if evaluates == "steps":
        if args.eval_steps is None:
            args.eval_steps = args.save_steps if saves == "steps" else EVAL_STEPS
        if not args.eval_steps > 0:
            raise _refusal("eval_steps", args, "out of range", "a number of steps, or below 1 a share of all steps")
    if args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"
    args.metric_for_best_model = args.metric_for_best_model.removeprefix("eval_")
    if args.load_best_model_at_end and saves != "best":
        _check_saved_when_evaluated(args, evaluates, saves)


def _check_saved_when_evaluated(args: Any, evaluates: str, saves: str) -> None:
    """As transformers requires for --load_best_model_at_end: each checkpoint is evaluated."""
    if evaluates != saves:
        raise Refusal(
            "C-FLAG", "the best checkpoint must be one that is saved when the model is evaluated",
            key="--load_best_model_at_end", found=f"--eval_strategy {evaluates}, --save_strategy {saves}",
            fix=f"--save_strategy {evaluates}",
        )  # fmt: skip
    if evaluates == "steps":
        every, save = args.eval_steps, args.save_steps
        # in millionths: both may be shares
        if (every < 1) != (save < 1) or round(save * 1_000_000) % max(round(every * 1_000_000), 1):
            raise Refusal(
                "C-FLAG", "checkpoints would be saved that were not evaluated", key="--load_best_model_at_end",
                found=f"--eval_steps {every:g}, --save_steps {save:g}",
                expected="a --save_steps that is a multiple of --eval_steps", fix=f"--save_steps {every:g}",
            )  # fmt: skip


def check_evaluation(data: DataSettings, args: Any) -> None:
    """Check the flags of validation against those of the data.

    Raises:
        Refusal: C-FLAG.
    """
    if not 0 <= data.validation_split < 1:
        raise Refusal(
            "C-FLAG", "out of range", key="--validation_split", found=data.validation_split,
            expected="a share above 0 and below 1",
        )  # fmt: skip
    names, strategy = set_names(data), _name(args.eval_strategy)
    if names and strategy == "no" and not args.eval_on_start:
        key = "--eval_data_path" if data.eval_data_path else "--validation_split"
        fix = "--eval_strategy steps, with --eval_steps, or --eval_strategy epoch"
        raise Refusal("C-FLAG", "validation data that would never be evaluated", key=key, fix=fix)
    if not names and (strategy != "no" or args.eval_on_start):
        key = "--eval_on_start" if strategy == "no" else f"--eval_strategy {strategy}"
        fix = "--validation_split 0.01, or --eval_data_path FILE"
        raise Refusal("C-FLAG", "there is no validation data", key=key, fix=fix)
    metrics = metric_names(names)
    if strategy != "no" and args.metric_for_best_model not in metrics:
        raise unknown_value("--metric_for_best_model", args.metric_for_best_model, metrics, "unknown metric")


def metric_names(sets: Sequence[str]) -> list[str]:
    """Names of the metrics of these validation sets: of all together, and if there are several also of each."""
    prefixes = ["", *(f"{name}_" for name in sets)] if len(sets) > 1 else [""]
    return [prefix + metric for prefix in prefixes for metric in METRICS]


def _name(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))  # of an enumeration


def _refusal(name: str, args: Any, what: str, fix: str) -> Refusal:
    return Refusal("C-FLAG", what, key=f"--{name}", found=_name(getattr(args, name)), fix=fix)
