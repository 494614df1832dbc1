"""Loads a run or an export as a :class:`ChatModel`, which answers questions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from llava_moslora.config import ModelSettings
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json
from llava_moslora.files.manifest import MANIFEST
from llava_moslora.models.assemble import assemble
from llava_moslora.models.llava_folder import is_llava_folder
from llava_moslora.models.llm import read_llm_config
from llava_moslora.models.names import ADAPTER_NAME, adapter_tensor
from llava_moslora.models.projector import read_projector
from llava_moslora.models.towers import tokens_per_image
from llava_moslora.models.vision import read_vision_config
from llava_moslora.runs.checkpoints import checkpoints, model_checkpoint
from llava_moslora.runs.fingerprint import check_base
from llava_moslora.runs.record import EXPORT, RUN, TOKENIZER, RunRecord, read_run
from llava_moslora.text.templates import recognise_template, stop_token_ids
from llava_moslora.text.tokenizer import load_tokenizer

ATTEMPTS = 10  # to load a checkpoint of a running training, which may delete it meanwhile


@dataclass
class ChatModel:
    """What :func:`llava_moslora.inference.generate.answer` needs."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    template: str
    transform: ImageTransform | None  # None: an LLM without a vision tower

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids at which an answer ends: where training stopped."""
        return stop_token_ids(self.tokenizer, self.template)

    @property
    def tokens_per_image(self) -> int:
        self.require_images()
        return tokens_per_image(self.model.config.vision_config)

    def require_images(self) -> ImageTransform:
        """The transform.

        Raises:
            Refusal: D-IMAGES, this model is text-only.
        """
        if self.transform is None:
            raise Refusal(
                "D-IMAGES", "this model is text-only and cannot process images", found="a question with an image",
                fix="ask without images, or use another model",
            )  # fmt: skip
        return self.transform


def load_run(
    run: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    checkpoint: Path | None = None,
    llm: str | Path | None = None,
    vision_tower: str | None = None,
    bits: int | None = None,
    llm_dtype: torch.dtype | None = None,
) -> ChatModel:
    """A training run's model in ``dtype``, in eval mode.

    Args:
        run: the ``--output_dir`` of a training.
        trained: with ``checkpoint``; False: as it was before the first step.
        checkpoint: whose files were verified; None: the run's model (``model_checkpoint``).
        llm, vision_tower: the current paths of the base models, if they were moved.
        bits: 16 or 4; None: as it was trained.
        llm_dtype: of the LLM's base weights, if not ``dtype``; weights that are stored in it stay memory-mapped.

    Raises:
        Refusal: no run, no valid checkpoint; K-BASE, the base is not the one that the run was trained on; P-PRUNED, the
            training run is still active and deleted the checkpoint meanwhile.
    """
    run = Path(run)
    record = read_run(run)
    base = record.located.model
    model_settings = replace(
        base,
        model_name_or_path=str(llm or base.model_name_or_path),
        vision_tower=None if base.text_only else vision_tower or base.vision_tower,
        bits=bits or base.bits,
        attn_implementation="sdpa",  # which every machine has, whatever it was trained with
    )
    for _ in range(1 if checkpoint else ATTEMPTS):
        used = checkpoint or _checkpoint_of(run, trained)
        try:
            return _load(run, record, replace(model_settings), used, trained, dtype, llm_dtype)
        except Exception as error:
            if used is None or used.is_dir():
                raise
            pruned = error
    raise Refusal(
        "P-PRUNED", "the run is still training and deleted the checkpoint while it was read", file=used,
        fix="start the same command again",
    ) from pruned  # fmt: skip


def _checkpoint_of(run: Path, trained: bool) -> Path | None:
    """The run's checkpoint; for the untrained model any checkpoint: each records which base the run started from."""
    if trained:
        return model_checkpoint(run)
    return next((c for c in checkpoints(run) if (c / MANIFEST).is_file()), None)


def _load(
    run: Path, record: RunRecord, settings: ModelSettings, checkpoint: Path | None, trained: bool, dtype: torch.dtype,
    llm_dtype: torch.dtype | None,
) -> ChatModel:  # fmt: skip
    if checkpoint is not None:
        _check_bases(settings, checkpoint, with_projector=not trained)
    if trained:  # every checkpoint has the complete projector
        settings.pretrain_mm_mlp_adapter = None
    tokenizer = load_tokenizer(run / TOKENIZER, images=not settings.text_only)
    model, processor = assemble(settings, tokenizer=tokenizer, dtype=dtype, llm_dtype=llm_dtype)
    if trained:
        assert checkpoint is not None  # or it was refused
        model = _with_checkpoint(model, checkpoint, dtype)
    transform = None if settings.text_only else ImageTransform.from_settings(processor, record.data)
    return ChatModel(model.eval(), tokenizer, record.model.template, transform)


def _check_bases(model: ModelSettings, checkpoint: Path, *, with_projector: bool) -> None:
    read_llm_config(model.model_name_or_path)  # a missing folder is refused as one
    check_base(model.model_name_or_path, checkpoint, "llm")
    if model.text_only:
        return
    read_vision_config(model.tower)
    check_base(model.tower, checkpoint, "vision_tower")
    if with_projector and model.pretrain_mm_mlp_adapter:
        check_base(model.pretrain_mm_mlp_adapter, checkpoint, "projector")


def _with_checkpoint(model, checkpoint: Path, dtype: torch.dtype) -> nn.Module:
    if (checkpoint / "adapter").is_dir():
        # float32 also over 16-bit weights, as trained; rounded below where ``dtype`` asks for it
        model = PeftModel.from_pretrained(
            model, str(checkpoint / "adapter"), adapter_name=ADAPTER_NAME, autocast_adapter_dtype=True
        )
        for name, parameter in model.named_parameters():
            if adapter_tensor(name) or "modules_to_save" in name:
                parameter.data = parameter.data.to(dtype)
        return model
    config = model.config
    tensors = read_projector(checkpoint / "projector", config.vision_config.hidden_size, config.text_config.hidden_size)
    model.model.multi_modal_projector.load_state_dict(tensors, strict=True)
    return model


def load_export(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> ChatModel:
    """A complete LLaVA in ``dtype``, in eval mode: an export of this package, or any that a new run may start from; or
    a text-only LLM, an export of ``--format llm`` or any other.

    The prompt template is the one the export was trained with; for other folders it is detected from the tokenizer.

    Raises:
        Refusal: neither of them, or its template is unknown.
    """
    folder = Path(folder)
    parts, sees = ModelSettings(str(folder)), is_llava_folder(folder)
    if sees:
        parts = ModelSettings(str(folder), vision_tower=str(folder), pretrain_mm_mlp_adapter=str(folder))
    tokenizer = load_tokenizer(folder, images=sees)
    model, processor = assemble(parts, tokenizer=tokenizer, dtype=dtype)
    file = folder / EXPORT
    facts = read_json(file) if file.is_file() else {}
    template = facts.get("template") or recognise_template(tokenizer)
    transform = None
    if sees:
        pads = read_json(folder / "preprocessor_config.json").get("do_pad", False)
        transform = ImageTransform.from_processor(processor, "pad" if pads else "crop")
    return ChatModel(model.eval(), tokenizer, template, transform)


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, trained: bool = True, checkpoint: Path | None = None
) -> ChatModel:
    """A run or an export, whichever ``folder`` is, on the GPU if there is one.

    Args:
        dtype: None: bfloat16 on a GPU that has it, else float32.
        trained: False: a run as it was before the first step; never an export.
        checkpoint: of a run, whose files were verified; None: the run's model (``model_checkpoint``).

    Raises:
        Refusal: C-PATH, neither of them; whatever :func:`load_run` and :func:`load_export` refuse.
    """
    folder = Path(folder)
    gpu = torch.cuda.is_available()
    dtype = dtype or (torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32)
    if (folder / RUN).is_file() or not trained:
        chat_model = load_run(folder, dtype=dtype, trained=trained, checkpoint=checkpoint)
    elif (folder / "config.json").is_file():
        chat_model = load_export(folder, dtype=dtype)
    else:
        raise Refusal(
            "C-PATH", "neither a run nor a model" if folder.is_dir() else "no such folder", file=folder,
            expected=f"a folder with {RUN}, or one with the config.json of a LLaVA or an LLM",
            fix="give the --output_dir of a training, or an export of --format hf or llm",
        )  # fmt: skip
    chat_model.model.to("cuda" if gpu else "cpu")
    return chat_model
