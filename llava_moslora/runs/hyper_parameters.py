"""What of a run's training an export states, and the paper's Table 8 has or leaves out."""

from __future__ import annotations

from typing import Any

from llava_moslora.runs.record import RunSettings

HYPER_PARAMETERS = (
    *("learning_rate", "global_batch_size", "num_train_epochs", "max_steps"),
    *("vision_lr", "mm_projector_lr", "mixer_lr", "lora_plus_ratio"),
)


def hyper_parameters(record: RunSettings) -> dict[str, Any]:
    """The values of :data:`HYPER_PARAMETERS`; None where the run does not state one."""
    values = {name: record.training_value(name) for name in HYPER_PARAMETERS}
    return values | {"global_batch_size": record.global_batch_size}
