"""``vision``: only the merged vision tower, complete, under names that transformers 4 and 5 read."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.export.formats import FORMATS
from llava_moslora.export.target import ExportPlan, Target
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import WeightFiles, renamed, save_config
from llava_moslora.files.disk import write_json
from llava_moslora.models.towers import kind_of


def plan(trained: TrainedRun, dtype: torch.dtype) -> ExportPlan:
    return ExportPlan(
        weights=[weights(trained, dtype)],
        write_files=lambda folder: write_files(trained, folder, dtype),
        load_from={"vision": "."},
        rounded=("vision_tower",),
    )


TARGET = Target(
    name="vision",
    summary=FORMATS["vision"],
    usage="""from transformers import VISION_CLASS
tower = VISION_CLASS.from_pretrained(FOLDER, dtype="auto")  # the features are hidden_states[-2][:, CLASS_TOKENS:]""",
    plan=plan,
)


def weights(trained: TrainedRun, dtype: torch.dtype, folder: str = "") -> WeightFiles:
    return WeightFiles(folder, renamed(trained.vision_tensors(), ("", "vision_model.")), dtype)


def write_files(trained: TrainedRun, folder: Path, dtype: torch.dtype) -> None:
    config = trained.exported_vision_config(dtype)
    config.architectures = [kind_of(config).model.__name__]
    config.vision_feature_layer = -2  # for llama.cpp's converter, which otherwise runs a layer too few
    save_config(config, folder)
    write_json(folder / "preprocessor_config.json", trained.record.preprocessor)
