"""A run or an export, loaded to answer: the same four things whatever it was loaded from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerFast

from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.errors import Refusal
from llava_moslora.files.json import read_json
from llava_moslora.files.manifest import MANIFEST, read_facts
from llava_moslora.models.assemble import assemble, tokens_per_image
from llava_moslora.models.llava_folder import is_llava_folder
from llava_moslora.models.llm import read_llm_config
from llava_moslora.models.names import ADAPTER_NAME
from llava_moslora.models.projector import read_projector
from llava_moslora.models.vision import read_vision_config
from llava_moslora.runs.checkpoints import checkpoints, newest_valid
from llava_moslora.runs.record import RUN, TOKENIZER, check_seed, fingerprint, read_run
from llava_moslora.text.conversation import recognise_template
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer

EXPORT = "export.json"  # beside an export's weights: what it is an export of


@dataclass
class ChatModel:
    """What :func:`llava_moslora.inference.generate.answer` needs."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerFast
    template: str
    transform: ImageTransform

    @property
    def tokens_per_image(self) -> int:
        return tokens_per_image(self.model.config.vision_config)


def newest_checkpoint(run: Path) -> Path:
    """The newest valid checkpoint of a run.

    Raises:
        Refusal: the run has none, or the newest is not this run's own: renamed, or of another seed.
    """
    checkpoint, skipped = newest_valid(run)
    if checkpoint is None:
        raise Refusal(
            "K-NONE",
            "the run has no valid checkpoint",
            file=run,
            found="; ".join(r.line() for r in skipped) or "none at all",
            fix="let the training reach its first --save_steps, or its end",
        )
    check_seed(read_run(run), checkpoint, read_facts(checkpoint))
    return checkpoint


def check_base(source: str | Path, checkpoint: Path, part: str, flag: str | None = None) -> None:
    """Refuse a base whose configuration or weight files are not those that ``checkpoint`` was trained on: another model
    of the same shape runs as well, and answers otherwise.

    Args:
        part: of the base, as the manifest calls it: ``llm``, ``vision_tower`` or ``projector``.
        flag: by which the user chose ``source``; None: run.json names it.

    Raises:
        Refusal: K-BASE; K-MANIFEST, the checkpoint does not say what it was trained on.
    """
    manifest = read_facts(checkpoint)
    if part not in manifest:
        raise Refusal(
            "K-MANIFEST", "the checkpoint does not say which base it belongs to", file=checkpoint / MANIFEST,
            key=part, fix="use a checkpoint that scripts/train_vit_llm.py wrote",
        )  # fmt: skip
    recorded, now = manifest[part], fingerprint(source)
    matter = [name for name in recorded.keys() | now.keys() if name == "config.json" or not name.endswith(".json")]
    if differing := sorted(name for name in matter if recorded.get(name) != now.get(name)):
        name = differing[0]
        file = source if str(source).endswith(f"/{name}") else f"{source}/{name}"
        raise Refusal(
            "K-BASE", "not the base that this run was trained on, or changed since", file=file, key=flag,
            found=now.get(name, "no such file"), expected=recorded.get(name, "no such file"),
            fix=f"give the run's own base as {flag}" if flag else "put the run's own base there",
        )  # fmt: skip


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
        checkpoint: whose files were verified; None: the newest valid one.
        llm, vision_tower: where the base is now, if not where it was.
        bits: 16 or 4, if the LLM shall be loaded otherwise than it was trained.
        llm_dtype: of the LLM's own weights, if not ``dtype``; weights that are stored in it stay mapped.

    Raises:
        Refusal: no run, no valid checkpoint; K-BASE, the base is not the one that the run was trained on.
    """
    run = Path(run)
    settings = read_run(run)["settings"]
    parts = settings["model"]
    llm, vision_tower = llm or parts["model_name_or_path"], vision_tower or parts["vision_tower"]
    if trained:
        checkpoint = checkpoint or newest_checkpoint(run)
    elif checkpoint is None:  # whichever: all say which base the run began from; before the first there is none to ask
        checkpoint = next((c for c in checkpoints(run) if (c / MANIFEST).is_file()), None)
    if checkpoint is not None:
        read_llm_config(llm)  # a folder that is gone is told as such
        check_base(llm, checkpoint, "llm")
        read_vision_config(vision_tower)
        check_base(vision_tower, checkpoint, "vision_tower")
        if not trained and parts["pretrain_mm_mlp_adapter"]:
            check_base(parts["pretrain_mm_mlp_adapter"], checkpoint, "projector")
    tokenizer = load_tokenizer(run / TOKENIZER)
    model, preprocessor = assemble(
        llm,
        vision_tower,
        None if trained else parts["pretrain_mm_mlp_adapter"],  # every checkpoint holds the whole projector
        tokenizer=tokenizer,
        image_token_id=image_token_id(tokenizer),
        dtype=dtype,
        bits=bits or parts["bits"],
        llm_dtype=llm_dtype,
    )
    if trained:
        model = _with_checkpoint(model, checkpoint, dtype)
    data = settings["data"]
    transform = ImageTransform.from_processor(preprocessor, data["image_aspect_ratio"], data.get("image_engine", "pil"))
    return ChatModel(model.eval(), tokenizer, parts["version"], transform)


def _with_checkpoint(model, checkpoint: Path, dtype: torch.dtype) -> nn.Module:
    if (checkpoint / "adapter").is_dir():
        # float32 also over 16-bit weights, as trained; rounded below where ``dtype`` asks for it
        model = PeftModel.from_pretrained(
            model, str(checkpoint / "adapter"), adapter_name=ADAPTER_NAME, autocast_adapter_dtype=True
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = parameter.data.to(dtype)
        return model
    config = model.config
    tensors = read_projector(checkpoint / "projector", config.vision_config.hidden_size, config.text_config.hidden_size)
    model.model.multi_modal_projector.load_state_dict(tensors, strict=True)
    return model


def load_export(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> ChatModel:
    """A complete LLaVA in ``dtype``, in eval mode: an export of ours, or any of those a new run may start from.

    The prompt template is the one the export was trained with; of another folder, the one its tokenizer tells.

    Raises:
        Refusal: not a complete LLaVA, or its template is not known.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(folder)
    model, preprocessor = assemble(
        folder, str(folder), folder, tokenizer=tokenizer, image_token_id=image_token_id(tokenizer), dtype=dtype
    )
    file = folder / EXPORT
    facts = read_json(file) if file.is_file() else {}
    template = facts.get("template") or recognise_template(tokenizer)
    pads = read_json(folder / "preprocessor_config.json").get("do_pad", False)
    transform = ImageTransform.from_processor(preprocessor, "pad" if pads else "crop")
    return ChatModel(model.eval(), tokenizer, template, transform)


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> ChatModel:
    """A run or an export, whichever ``folder`` is, on the GPU if there is one.

    Args:
        dtype: None: bfloat16 on a GPU that has it, else float32.

    Raises:
        Refusal: C-PATH, neither of them; whatever :func:`load_run` and :func:`load_export` refuse.
    """
    folder = Path(folder)
    gpu = torch.cuda.is_available()
    dtype = dtype or (torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32)
    if (folder / RUN).is_file():
        chat_model = load_run(folder, dtype=dtype)
    elif is_llava_folder(folder):
        chat_model = load_export(folder, dtype=dtype)
    else:
        raise Refusal(
            "C-PATH",
            "neither a run nor a complete LLaVA" if folder.is_dir() else "no such folder",
            file=folder,
            expected=f"a folder with {RUN}, or one with the config.json of a LLaVA",
            fix="give the --output_dir of a training, or an export of --format hf",
        )
    chat_model.model.to("cuda" if gpu else "cpu")
    return chat_model
