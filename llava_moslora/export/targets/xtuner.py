"""``xtuner``: the folder of folders that ``xtuner chat`` and VLMEvalKit's ``LLaVA_XTuner`` load, merged.

XTuner runs on transformers 4: tensor names are that version's.
"""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.export.formats import FORMATS
from llava_moslora.export.target import ExportPlan, Target, check_clip
from llava_moslora.export.targets import llm, projector, vision
from llava_moslora.export.trained_run import TrainedRun


def plan(trained: TrainedRun, dtype: torch.dtype) -> ExportPlan:
    """Raises C-FORMAT for a tower that is not a CLIP."""
    check_clip(trained, "xtuner")

    def write_files(folder: Path) -> None:
        llm.write_files(trained, folder / "llm", dtype)
        vision.write_files(trained, folder / "visual_encoder", dtype)
        projector.write_files(trained, folder / "projector")

    return ExportPlan(
        weights=[
            llm.weights(trained, dtype, "llm"),
            vision.weights(trained, dtype, "visual_encoder"),
            projector.weights(trained, "projector"),
        ],
        write_files=write_files,
        load_from={"llm": "llm", "vision": "visual_encoder", "projector": "projector"},
        rounded=("llm", "lm_head", "vision_tower"),
    )


TARGET = Target(
    name="xtuner",
    summary=FORMATS["xtuner"],
    usage="""from vlmeval.vlm import LLaVA_XTuner
model = LLaVA_XTuner(FOLDER, llm_path=None, visual_encoder_path=None, prompt_template=TEMPLATE)""",
    plan=plan,
)
