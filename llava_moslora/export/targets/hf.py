"""``hf``: the merged model as one ``LlavaForConditionalGeneration`` folder, in the layout that every reader knows.

Tensors carry the names of transformers 4.36–4.51 (``language_model.model.…``, ``vision_tower.vision_model.…``), which
later versions and vLLM rename on loading; names are made here, never taken from a live model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlavaConfig

from llava_moslora.export.processor import write_processor
from llava_moslora.export.target import Layout, llm_config, renamed, save_config, vision_config
from llava_moslora.export.trained_run import TrainedRun, plan_tensors
from llava_moslora.export.writer import PlannedTensor, WeightFiles
from llava_moslora.models.assemble import tokens_per_image
from llava_moslora.models.towers import kind_of
from llava_moslora.text.tokenizer import image_token_id


def layout(trained: TrainedRun, dtype: torch.dtype) -> Layout:
    return Layout(
        weights=[WeightFiles("", tensors(trained), dtype)],
        finish=lambda folder: write_files(trained, folder, dtype),
        reopen={"llava": "."},
        merged=True,
        rounded=("llm", "vision", "projector"),
    )


def tensors(trained: TrainedRun, projector: dict | None = None, *, merged: bool = True) -> list[PlannedTensor]:
    """All tensors under the legacy names; with ``projector`` in the place of the trained one."""
    return [
        *renamed(trained.llm_tensors(merged=merged), ("", "language_model.")),
        *renamed(trained.vision_tensors(merged=merged), ("", "vision_tower.vision_model.")),
        *renamed(plan_tensors(projector or trained.projector), ("", "multi_modal_projector.")),
    ]


def write_files(trained: TrainedRun, folder: Path, dtype: torch.dtype) -> None:
    save_config(llava_config(trained, dtype), folder)
    trained.generation_config().save_pretrained(folder)
    write_processor(
        folder, trained.tokenizer, trained.template, trained.preprocessor, trained.vision_config, pad=trained.pads
    )


def llava_config(trained: TrainedRun, dtype: torch.dtype) -> LlavaConfig:
    """As llava-hf publishes it: the feature layer counted from the end, over a complete tower; the head untied."""
    return LlavaConfig(
        text_config=llm_config(trained.llm_config, trained.vocabulary, dtype),
        vision_config=vision_config(trained.vision_config, dtype),
        image_token_index=image_token_id(trained.tokenizer),
        image_seq_length=tokens_per_image(trained.vision_config),
        vision_feature_layer=-2,
        vision_feature_select_strategy=kind_of(trained.vision_config).strategy,
        projector_hidden_act="gelu",
        pad_token_id=trained.tokenizer.pad_token_id,
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
        dtype=dtype,
    )
