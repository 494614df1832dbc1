"""``projector``: only the projector, in float32, in the layout of XTuner's releases."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from llava_moslora.export import projector_model
from llava_moslora.export.formats import FORMATS
from llava_moslora.export.target import ExportPlan, Target
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import WeightFiles, plan_tensors, renamed
from llava_moslora.files.disk import write_json

MODEL_FILE = "modeling_projector"  # the name of the class in XTuner's releases


def plan(trained: TrainedRun, _: torch.dtype) -> ExportPlan:
    return ExportPlan(
        weights=[weights(trained)],
        write_files=lambda folder: write_files(trained, folder),
        load_from={"projector": "."},
    )


TARGET = Target(
    name="projector",
    summary=FORMATS["projector"],
    usage="""from safetensors.torch import load_file
weights = load_file(FOLDER + "/model.safetensors")  # linear, GELU, linear; XTuner runs modeling_projector.py""",
    plan=plan,
)


def weights(trained: TrainedRun, folder: str = "") -> WeightFiles:
    tensors = renamed(plan_tensors(trained.projector), ("linear_1.", "model.0."), ("linear_2.", "model.2."))
    return WeightFiles(folder, tensors, torch.float32)


def write_files(trained: TrainedRun, folder: Path) -> None:
    """XTuner's ``config.json`` and a class for ``AutoModel``: XTuner and VLMEvalKit run a projector's own code."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["ProjectorModel"],
        "auto_map": {"AutoConfig": f"{MODEL_FILE}.ProjectorConfig", "AutoModel": f"{MODEL_FILE}.ProjectorModel"},
        "model_type": "projector",
        "visual_hidden_size": trained.vision_config.hidden_size,
        "llm_hidden_size": trained.llm_config.hidden_size,
        "depth": 2,
        "hidden_act": "gelu",
        "bias": True,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)
    shutil.copyfile(projector_model.__file__, folder / f"{MODEL_FILE}.py")
