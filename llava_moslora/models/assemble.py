"""LLM folder + vision tower + projector → one LLaVA; only an LLM folder → that LLM, text-only.

The composed model is built on the meta device and the loaded parts are put into it, so that every part is loaded by its
own ``from_pretrained``, where DeepSpeed's ZeRO-3 partitions and bitsandbytes quantises.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import LlavaConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_utils import set_zero3_state
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_moslora.config import AdapterSettings, ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json
from llava_moslora.models.adapt import add_adapters, train_projector_only
from llava_moslora.models.attention import set_attention
from llava_moslora.models.llava import Llava, TextLlm, text_llm
from llava_moslora.models.llava_folder import check_tower_is_taken
from llava_moslora.models.llm import check_llm_composes, llm_on_meta, load_llm, mean_row, read_llm_config
from llava_moslora.models.projector import check_projector, read_projector
from llava_moslora.models.towers import drop_unused, kind_of, tokens_per_image
from llava_moslora.models.vision import load_vision_tower, read_vision_config
from llava_moslora.text.tokenizer import image_token_id

APPENDED_TOKENS = 2  # the image placeholder and a padding token, if the tokenizer has no spare ones

# Attributes of the outermost model by which PEFT and the Trainer detect that a part of it is quantised.
_QUANTISATION_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")


def assemble(
    settings: ModelSettings,
    *,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    llm_dtype: torch.dtype | None = None,
    quantised_from: torch.dtype | None = None,
) -> tuple[Llava | TextLlm, dict[str, Any]]:
    """The composed model in ``dtype``, everything frozen; without a vision tower the LLM.

    Args:
        settings: LLM, vision tower and projector each by itself, as ``llava_folder.name_parts`` gives them; a complete
            LLaVA's folder may stand for each of them. The LLM is a causal LM's folder
            (:mod:`llava_moslora.models.llm`), the vision tower a CLIP or SigLIP folder or ``open_clip:ARCH@FILE``
            (:mod:`llava_moslora.models.vision`), the projector a file or folder or None for a new one
            (:mod:`llava_moslora.models.projector`). ``bits`` 4: an NF4 LLM (double quantisation, compute in ``dtype``).
        tokenizer: with the image placeholder, if there is a vision tower; if it has more tokens than the LLM has
            embedding rows, rows are added.
        llm_dtype: of the LLM, if not ``dtype``. quantised_from: with 4 bits, as :func:`load_llm`.

    Returns:
        The model and the tower's image-processor settings (what ``preprocessor_config.json`` holds), or none.

    Raises:
        Refusal: a part is missing, damaged, or does not fit the others; before the tower's weights are read.
    """
    llm_folder = Path(settings.model_name_or_path)
    llm_config = read_llm_config(llm_folder)
    if settings.text_only:
        _check_tokens(tokenizer, llm_config, llm_folder)
        text = text_llm(load_llm(llm_folder, llm_dtype or dtype, settings.bits, quantised_from))
        _add_token_rows(text, len(tokenizer))
        set_attention(text, settings.attn_implementation)
        return text.requires_grad_(False), {}
    vision_tower = settings.tower
    vision_config = read_vision_config(vision_tower)
    check_tower_is_taken(llm_folder, vision_tower)
    image_token = image_token_id(tokenizer)
    _check_tokens(tokenizer, llm_config, llm_folder)
    tensors = None
    if settings.pretrain_mm_mlp_adapter is not None:
        tensors = read_projector(settings.pretrain_mm_mlp_adapter, vision_config.hidden_size, llm_config.hidden_size)
    vision, preprocessor = load_vision_tower(vision_tower, dtype=dtype)
    llm = load_llm(llm_folder, llm_dtype or dtype, settings.bits, quantised_from)
    _add_token_rows(llm, len(tokenizer))
    model = _compose(llm, vision, image_token, tokenizer.pad_token_id, dtype)
    projector = LlavaMultiModalProjector(model.config)
    if tensors is not None:
        projector.load_state_dict(tensors, strict=True)
    else:
        _scale_to_embeddings(projector, llm)
    model.model.multi_modal_projector = projector.to(dtype)
    set_attention(model, settings.attn_implementation)
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"grafting left parameters on the meta device: {left[:4]}"
    return model.requires_grad_(False), preprocessor


def check_parts(settings: ModelSettings, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse parts that are missing or do not fit each other, as :func:`assemble` would, from their configurations and
    the names and shapes of the projector's tensors: before the hours in which data are tokenised.

    Raises:
        Refusal: as :func:`assemble`; C-MODEL, an LLM whose loss is not what is trained (:func:`check_llm_composes`).
    """
    folder = Path(settings.model_name_or_path)
    llm_config = read_llm_config(folder)
    check_llm_composes(llm_config, folder)
    _check_tokens(tokenizer, llm_config, folder)
    if settings.text_only:
        return
    vision_width = read_vision_config(settings.tower).hidden_size
    check_tower_is_taken(folder, settings.tower)
    if settings.pretrain_mm_mlp_adapter is not None:
        check_projector(settings.pretrain_mm_mlp_adapter, vision_width, llm_config.hidden_size)


def model_on_meta(
    llm_config: PreTrainedConfig,
    vision_config: PreTrainedConfig | None,
    adapter: AdapterSettings,
    dtype: torch.dtype = torch.bfloat16,
) -> PeftModel | Llava:
    """The model that :func:`assemble` builds, ready to be trained, with every tensor on the meta device.

    For computing sizes: takes seconds and no memory, whatever the size. ``vision_config`` None: text only.
    """
    llm = llm_on_meta(llm_config, Path(llm_config.name_or_path))
    with torch.device("meta"):
        if vision_config is None:
            return add_adapters(text_llm(llm).requires_grad_(False), adapter).to(dtype)
        tower = kind_of(vision_config).model(vision_config)
        model = _compose(llm, tower, 0, None, dtype).requires_grad_(False)
        trained = train_projector_only(model) if adapter.tune_mm_mlp_adapter else add_adapters(model, adapter)
        return trained.to(dtype)


def _compose(llm: PreTrainedModel, vision: PreTrainedModel, image_token_id, pad_token_id, dtype: torch.dtype) -> Llava:
    """LLM and tower in one LLaVA whose projector is still on the meta device."""
    config = LlavaConfig(
        text_config=llm.config,
        vision_config=vision.config,
        image_token_index=image_token_id,
        image_seq_length=tokens_per_image(vision.config),
        # LLaVA's hidden_states[-2], counted from the front, because the last layer is cut off below.
        vision_feature_layer=vision.config.num_hidden_layers - 1,
        vision_feature_select_strategy=kind_of(vision.config).strategy,
        pad_token_id=pad_token_id,
        dtype=dtype,
    )
    with torch.device("meta"), set_zero3_state():  # only the outer module: its parts are replaced
        model = Llava(config)
    model.model.language_model, model.lm_head = llm.model, llm.lm_head
    model.model.vision_tower = vision
    drop_unused(vision, config.vision_feature_layer)
    model.generation_config = llm.generation_config
    for mark in _QUANTISATION_MARKS:
        if hasattr(llm, mark):
            setattr(model, mark, getattr(llm, mark))
    if getattr(llm.config, "quantization_config", None) is not None:
        model.config.quantization_config = llm.config.quantization_config
    return model


def _check_tokens(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, folder: Path) -> None:
    """Refuse a tokenizer of another LLM, detected from its size or its first token."""
    fix = "give the LLM's folder, including its tokenizer files"
    if len(tokenizer) > config.vocab_size + APPENDED_TOKENS:
        raise Refusal(
            "K-TOKENIZER", "the tokenizer has more tokens than the LLM has rows", file=folder, key="vocab_size",
            found=len(tokenizer), expected=f"at most {config.vocab_size} and {APPENDED_TOKENS} appended", fix=fix,
        )  # fmt: skip
    raw = read_json(folder / "config.json")
    bos = raw.get("bos_token_id", raw.get("text_config", {}).get("bos_token_id"))  # not the class's default
    if None not in (bos, tokenizer.bos_token_id) and bos != tokenizer.bos_token_id:
        raise Refusal(
            "K-TOKENIZER", "the tokenizer's BOS token differs from the LLM's", file=folder,
            key="bos_token_id", found=tokenizer.bos_token_id, expected=bos, fix=fix,
        )  # fmt: skip


def _add_token_rows(llm: PreTrainedModel, vocabulary: int) -> None:
    """Add rows for appended tokens: the mean of the others, so that their logit is never the largest."""
    rows = llm.get_input_embeddings().num_embeddings
    if vocabulary <= rows:
        return
    llm.resize_token_embeddings(vocabulary, mean_resizing=False)
    weights = {id(m.weight): m.weight for m in (llm.get_input_embeddings(), llm.get_output_embeddings())}
    for weight in weights.values():
        with gathered(weight), torch.no_grad():
            weight[rows:] = mean_row(weight[:rows])


def gathered(*parameters: nn.Parameter):
    """A context in which ZeRO-3's partitioned parameters are gathered; rank 0's changes are kept. Else a no-op."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    from deepspeed import zero  # imported here: it takes seconds, and inference never needs it

    return zero.GatheredParameters(partitioned, modifier_rank=0)


def _scale_to_embeddings(projector: nn.Module, llm: PreTrainedModel) -> None:
    """Scale a new projector so that its outputs are as large as token embeddings.

    PyTorch's default gives outputs several times larger or smaller, and the first steps of stage 1 would only correct
    the scale. Vision features have a standard deviation near 1: the factor is measured with such noise.
    """
    embedding = llm.get_input_embeddings().weight
    noise = torch.randn(256, projector.linear_1.in_features, generator=torch.Generator().manual_seed(0))
    with gathered(embedding), torch.no_grad():
        factor = embedding.float().std() / projector(noise).std()
        projector.linear_2.weight.mul_(factor.to("cpu"))
        projector.linear_2.bias.mul_(factor.to("cpu"))
