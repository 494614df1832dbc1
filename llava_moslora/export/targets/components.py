"""``llm``, ``vision``, ``projector``: the trained parts each as an ordinary folder of its own kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from llava_moslora.export import projector_model
from llava_moslora.export.processor import known_to_transformers_4
from llava_moslora.export.target import Layout, llm_config, renamed, save_config, vision_config
from llava_moslora.export.trained_run import TrainedRun, plan_tensors
from llava_moslora.export.writer import WeightFiles
from llava_moslora.files.json import write_json
from llava_moslora.models.towers import kind_of
from llava_moslora.text.conversation import chat_template

PROJECTOR_FILE = "modeling_projector"  # the name under which XTuner's releases carry the class
PROJECTOR_NAMES = (("linear_1.", "model.0."), ("linear_2.", "model.2."))


def llm(trained: TrainedRun, dtype: torch.dtype) -> Layout:
    """The merged LLM as transformers' causal LM: an InternLM2 comes out as a Llama."""
    return Layout(
        [llm_weights(trained, dtype, "")],
        lambda folder: write_llm(trained, folder, dtype),
        {"llm": "."},
        True,
        ("llm",),
    )


def vision(trained: TrainedRun, dtype: torch.dtype) -> Layout:
    """The merged tower, complete, as a model of its kind, under the names that transformers 4 and 5 read."""
    weights = [vision_weights(trained, dtype, "")]
    return Layout(weights, lambda folder: write_vision(trained, folder, dtype), {"vision": "."}, True, ("vision",))


def projector(trained: TrainedRun, _: torch.dtype) -> Layout:
    """The projector as XTuner publishes it, in float32; ``--pretrain_mm_mlp_adapter`` takes the folder."""
    weights = [projector_weights(trained, "")]
    return Layout(weights, lambda folder: write_projector(trained, folder), {"projector": "."}, True)


def llm_weights(trained: TrainedRun, dtype: torch.dtype, folder: str, *, merged: bool = True) -> WeightFiles:
    return WeightFiles(folder, trained.llm_tensors(merged=merged), dtype)


def write_llm(trained: TrainedRun, folder: Path, dtype: torch.dtype) -> None:
    save_config(llm_config(trained.llm_config, trained.vocabulary, dtype), folder)
    trained.generation_config().save_pretrained(folder)
    trained.tokenizer.chat_template = chat_template(trained.template, trained.tokenizer)
    trained.tokenizer.save_pretrained(folder)
    known_to_transformers_4(folder)


def vision_weights(trained: TrainedRun, dtype: torch.dtype, folder: str) -> WeightFiles:
    return WeightFiles(folder, renamed(trained.vision_tensors(), ("", "vision_model.")), dtype)


def write_vision(trained: TrainedRun, folder: Path, dtype: torch.dtype) -> None:
    config = vision_config(trained.vision_config, dtype)
    config.architectures = [kind_of(config).model.__name__]
    save_config(config, folder)
    write_json(folder / "preprocessor_config.json", trained.preprocessor)


def projector_weights(trained: TrainedRun, folder: str) -> WeightFiles:
    return WeightFiles(folder, renamed(plan_tensors(trained.projector), *PROJECTOR_NAMES), torch.float32)


def write_projector(trained: TrainedRun, folder: Path) -> None:
    """XTuner's ``config.json`` and a class for ``AutoModel``: XTuner and VLMEvalKit run a projector's own code."""
    folder.mkdir(parents=True, exist_ok=True)
    width, llm_width = trained.vision_config.hidden_size, trained.llm_config.hidden_size
    config = {
        "architectures": ["ProjectorModel"],
        "auto_map": {
            "AutoConfig": f"{PROJECTOR_FILE}.ProjectorConfig",
            "AutoModel": f"{PROJECTOR_FILE}.ProjectorModel",
        },
        "model_type": "projector",
        "visual_hidden_size": width,
        "llm_hidden_size": llm_width,
        "depth": 2,
        "hidden_act": "gelu",
        "bias": True,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)
    shutil.copyfile(projector_model.__file__, folder / f"{PROJECTOR_FILE}.py")
