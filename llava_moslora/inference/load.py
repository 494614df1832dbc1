"""A run or an export, loaded to answer: the same four things whatever it was loaded from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from llava_moslora.data.images import ImageTransform
from llava_moslora.data.tokenizer import image_token_id, load_tokenizer
from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import ADAPTER_NAME, assemble, tokens_per_picture
from llava_moslora.models.projector import read_projector
from llava_moslora.runs import publish
from llava_moslora.runs.record import TOKENIZER, read_run


@dataclass
class Answerer:
    """What :func:`llava_moslora.inference.generate.answer` needs."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    template: str
    transform: ImageTransform

    @property
    def tokens_per_image(self) -> int:
        return tokens_per_picture(self.model.config.vision_config)


def newest_checkpoint(run: Path) -> Path:
    """The newest valid checkpoint of a run.

    Raises:
        Refusal: the run has none.
    """
    checkpoint, passed_over = publish.newest_valid(run)
    if checkpoint is None:
        raise Refusal(
            "K-NONE",
            "the run has no valid checkpoint",
            file=run,
            found="; ".join(r.line() for r in passed_over) or "none at all",
            fix="let the training reach its first --save_steps, or its end",
        )
    return checkpoint


def load_run(run: str | Path, *, dtype: torch.dtype = torch.float32, trained: bool = True) -> Answerer:
    """A training run's model in ``dtype``, in eval mode.

    Args:
        run: the ``--output_dir`` of a training.
        trained: with its newest valid checkpoint; False: as it was before the first step.
    """
    run = Path(run)
    settings = read_run(run)["settings"]
    parts = settings["model"]
    tokenizer = load_tokenizer(run / TOKENIZER)
    model, preprocessor = assemble(
        parts["model_name_or_path"],
        parts["vision_tower"],
        parts["pretrain_mm_mlp_adapter"],
        tokenizer=tokenizer,
        image_token_id=image_token_id(tokenizer),
        dtype=dtype,
        bits=parts["bits"],
    )
    if trained:
        model = _with_checkpoint(model, newest_checkpoint(run), dtype)
    transform = ImageTransform.from_settings(preprocessor, settings["data"]["image_aspect_ratio"])
    return Answerer(model.eval(), tokenizer, parts["version"], transform)


def _with_checkpoint(model, checkpoint: Path, dtype: torch.dtype) -> nn.Module:
    if (checkpoint / "adapter").is_dir():
        model = PeftModel.from_pretrained(
            model, str(checkpoint / "adapter"), adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False
        )
        return model.to(dtype)
    config = model.config
    tensors = read_projector(checkpoint / "projector", config.vision_config.hidden_size, config.text_config.hidden_size)
    model.model.multi_modal_projector.load_state_dict(tensors, strict=True)
    return model
