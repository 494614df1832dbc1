"""LLM folder + vision tower + projector → one LLaVA, and MoSLoRA adapters placed in both towers.

The composed model is built on the meta device and the loaded parts are grafted in, so that every part is loaded by its
own ``from_pretrained``: that is where DeepSpeed's ZeRO-3 partitions and bitsandbytes quantises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlavaConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.errors import Refusal
from llava_moslora.models.llava import Llava
from llava_moslora.models.projector import read_projector
from llava_moslora.models.vision import load_vision_tower

LLM, VISION, PROJECTOR, HEAD = "model.language_model", "model.vision_tower", "model.multi_modal_projector", "lm_head"
ADAPTER_NAME = "default"

# What PEFT and the Trainer look for on the outermost model to know that a part of it is quantised.
_QUANTISATION_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")


@dataclass(frozen=True)
class TowerAdapter:
    """The adapter of one tower. ``target_modules`` are suffixes of linears; empty: every linear of every layer."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.05
    mixer_init: str = "kaiming_uniform"
    train_mixer: bool = True
    target_modules: tuple[str, ...] = ()


def read_llm_config(folder: str | Path):
    """The LLM's configuration, with what cannot be used refused before any weight is read.

    Raises:
        Refusal: no such folder, remote code asked for, or an architecture that LLaVA does not compose with.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise Refusal(
            "C-PATH",
            "no LLM here" if folder.is_dir() else "no such folder",
            file=folder,
            key="--model_name_or_path",
            expected="a downloaded folder with config.json, tokenizer and *.safetensors",
            fix="check the path, or download the model first: nothing is fetched at run time",
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise Refusal(
            "C-MODEL", "not a configuration transformers knows", file=folder / "config.json", found=error
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise Refusal(
            "C-MODEL",
            "the base is already quantised, and merging into it would not be exact",
            file=folder / "config.json",
            key="quantization_config",
            fix="give the 16-bit folder; --bits 4 quantises it while loading",
        )
    return config


def tokens_per_picture(vision_config) -> int:
    """Placeholders per picture: patches without the class token."""
    return (vision_config.image_size // vision_config.patch_size) ** 2


def assemble(
    llm_folder: str | Path,
    vision_tower: str,
    projector: str | Path | None,
    *,
    tokenizer,
    image_token_id: int,
    dtype: torch.dtype,
    bits: int = 16,
) -> tuple[Llava, dict]:
    """The composed model in ``dtype``, everything frozen.

    Args:
        llm_folder: a transformers causal LM with ``model`` and ``lm_head`` (LLaMA, Vicuna, Qwen, Mistral, …).
        vision_tower: a CLIP folder or ``open_clip:ARCH@FILE`` (:mod:`llava_moslora.models.vision`).
        projector: a pretrained projector (:mod:`llava_moslora.models.projector`), or None for a new one.
        tokenizer: with the image placeholder; where it has more tokens than the LLM has rows, the LLM gets rows.
        image_token_id: the placeholder's id.
        bits: 16, or 4 for an NF4 LLM (double quantisation, compute in ``dtype``).

    Returns:
        The model and the tower's image-processor settings (what ``preprocessor_config.json`` holds).

    Raises:
        Refusal: a part is missing, damaged, or does not fit the others.
    """
    read_llm_config(llm_folder)
    vision, preprocessor = load_vision_tower(vision_tower, dtype=dtype)
    llm = _load_llm(llm_folder, dtype, bits)
    _add_token_rows(llm, len(tokenizer))
    config = LlavaConfig(
        text_config=llm.config,
        vision_config=vision.config,
        image_token_index=image_token_id,
        image_seq_length=tokens_per_picture(vision.config),
        # hidden_states[-2] named from the front: the last layer is not needed and is cut off below, and an index
        # from the end would then mean another layer.
        vision_feature_layer=vision.config.num_hidden_layers - 1,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    with torch.device("meta"), set_zero3_state():  # the frame only: its parts are replaced, nothing to partition
        model = Llava(config)
    model.model.language_model, model.lm_head = llm.model, llm.lm_head
    model.model.vision_tower = vision
    vision.encoder.layers = vision.encoder.layers[: config.vision_feature_layer]
    model.model.multi_modal_projector = _load_projector(config, projector, dtype, llm)
    model.generation_config = llm.generation_config
    for mark in _QUANTISATION_MARKS:
        if hasattr(llm, mark):
            setattr(model, mark, getattr(llm, mark))
    if getattr(llm.config, "quantization_config", None) is not None:
        model.config.quantization_config = llm.config.quantization_config
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"grafting left parameters on the meta device: {left[:4]}"
    return model.requires_grad_(False), preprocessor


def _load_llm(folder: str | Path, dtype: torch.dtype, bits: int) -> PreTrainedModel:
    quantization = None
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head"],
        )
    elif bits != 16:
        raise Refusal("C-FLAG", "unknown base precision", key="--bits", found=bits, expected="16 or 4")
    try:
        llm = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, quantization_config=quantization
        )
    except (OSError, RuntimeError) as error:
        raise Refusal("K-FILE", "the LLM's weights cannot be read", file=folder, found=error) from error
    if not (hasattr(llm, "model") and hasattr(llm, "lm_head")):
        raise Refusal(
            "C-MODEL",
            "this architecture does not compose into LlavaForConditionalGeneration",
            file=folder,
            found=type(llm).__name__,
            expected="a causal LM with `model` and `lm_head`, such as LlamaForCausalLM",
        )
    return llm


def _add_token_rows(llm: PreTrainedModel, vocabulary: int) -> None:
    """Rows for appended tokens, the mean of the others: as an output their logit is the mean, so never the largest."""
    rows = llm.get_input_embeddings().num_embeddings
    if vocabulary <= rows:
        return
    llm.resize_token_embeddings(vocabulary, mean_resizing=False)
    weights = {id(m.weight): m.weight for m in (llm.get_input_embeddings(), llm.get_output_embeddings())}
    for weight in weights.values():
        with gathered(weight), torch.no_grad():
            weight[rows:] = mean_row(weight[:rows])


def mean_row(weight: torch.Tensor) -> torch.Tensor:
    """The mean of all rows of [V, D] as [1, D], summed in float64 so that a later export computes the same row."""
    return weight.double().mean(dim=0, keepdim=True).to(weight.dtype)


def gathered(*parameters: nn.Parameter):
    """Under ZeRO-3 the parameters whole, changes kept on every rank; elsewhere nothing."""
    from deepspeed import zero  # imported here: it takes seconds, and inference never needs it

    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    return zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned))


def _load_projector(config: LlavaConfig, path: str | Path | None, dtype: torch.dtype, llm) -> nn.Module:
    projector = LlavaMultiModalProjector(config)
    if path is not None:
        tensors = read_projector(path, config.vision_config.hidden_size, config.text_config.hidden_size)
        projector.load_state_dict(tensors, strict=True)
    else:
        _scale_to_words(projector, llm)
    return projector.to(dtype)


def _scale_to_words(projector: nn.Module, llm: PreTrainedModel) -> None:
    """A new projector starts with outputs as large as word embeddings.

    PyTorch's default for a linear gives outputs several times larger or smaller than an LLM's embeddings, and a
    frozen LLM then spends the start of stage 1 on nothing but the scale. Features leave the tower with a standard
    deviation near 1; the factor is found by passing such noise through the projector.
    """
    embedding = llm.get_input_embeddings().weight
    noise = torch.randn(256, projector.linear_1.in_features, generator=torch.Generator().manual_seed(0))
    with gathered(embedding), torch.no_grad():
        factor = embedding.float().std() / projector(noise).std()
        projector.linear_2.weight.mul_(factor.to("cpu"))
        projector.linear_2.bias.mul_(factor.to("cpu"))


def linear_suffixes(model: nn.Module, tower: str) -> list[str]:
    """Names of the linears inside the layers of ``tower``, without the layer: ``self_attn.q_proj``, ``mlp.fc1`` …"""
    pattern = re.compile(rf"{re.escape(tower)}\.(?:encoder\.)?layers\.\d+\.(.+)")
    found = {
        m[1]: None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (m := pattern.fullmatch(name))
    }
    return list(found)


def add_adapters(model: Llava, llm: TowerAdapter | None, vision: TowerAdapter | None) -> PeftModel:
    """One MoSLoRA adapter over the whole model, per-tower settings as patterns, the projector trained whole.

    Layers whose output is never used (the last CLIP layer) are not in the model, so no adapter is ever without
    gradient. All trainable tensors get the model's dtype: ZeRO-3 asserts a single one.

    Raises:
        Refusal: a target that matches no linear; whatever :class:`MosLoraConfig` refuses.
    """
    towers = {LLM: llm, VISION: vision}
    regexes = {tower: _target_regex(model, tower, spec) for tower, spec in towers.items() if spec is not None}
    if not regexes:
        raise Refusal("C-FLAG", "no adapter asked for", key="--lora_r", fix="give --lora_r or --vision_lora_r above 0")
    main = next(spec for spec in towers.values() if spec is not None)
    own = {f"{re.escape(VISION)}\\..*": vision} if main is llm and vision is not None else {}
    config = MosLoraConfig(
        r=main.r,
        lora_alpha=main.lora_alpha,
        lora_dropout=main.lora_dropout,
        mixer_init=main.mixer_init,
        train_mixer=main.train_mixer,
        target_modules="|".join(regexes.values()),
        modules_to_save=[PROJECTOR],
        rank_pattern={key: spec.r for key, spec in own.items()},
        alpha_pattern={key: spec.lora_alpha for key, spec in own.items()},
        dropout_pattern={key: spec.lora_dropout for key, spec in own.items()},
        mixer_init_pattern={key: spec.mixer_init for key, spec in own.items()},
        train_mixer_pattern={key: spec.train_mixer for key, spec in own.items()},
    )
    return get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)


def _target_regex(model: nn.Module, tower: str, spec: TowerAdapter) -> str:
    available = linear_suffixes(model, tower)
    wanted = list(spec.target_modules) or available
    chosen = []
    for name in wanted:
        matches = [suffix for suffix in available if suffix == name or suffix.endswith("." + name)]
        if not matches:
            raise Refusal(
                "C-TARGET",
                "no linear of this tower has that name",
                key="--vision_lora_target_modules" if tower == VISION else "--lora_target_modules",
                found=name,
                expected="some of " + ", ".join(available),
            )
        chosen += matches
    names = "|".join(re.escape(name) for name in dict.fromkeys(chosen))
    return rf"{re.escape(tower)}\.(?:encoder\.)?layers\.\d+\.(?:{names})"


def train_projector_only(model: Llava) -> Llava:
    """Stage 1: everything frozen but the projector."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def describe(model: nn.Module) -> str:
    """One line per part: parameters in all, trained, of them adapter and mixer; counts hold under ZeRO-3 too."""
    parts = {"LLM": LLM, "vision tower": VISION, "projector": PROJECTOR, "LM head": HEAD}
    count = {part: [0, 0, 0] for part in parts}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # PEFT keeps the projector as it was loaded, beside the trained copy
            continue
        part = next(part for part, prefix in parts.items() if prefix + "." in "." + name)
        size = parameter_size(parameter)
        count[part][0] += size
        count[part][1] += size if parameter.requires_grad else 0
        count[part][2] += size if parameter.requires_grad and "lora_mixer" in name else 0
    rows = [f"{'part':<14}{'parameters':>16}{'trained':>14}{'of it mixers':>14}"]
    rows += [f"{part:<14}{total:>16,}{trained:>14,}{mixers:>14,}" for part, (total, trained, mixers) in count.items()]
    total, trained, mixers = (sum(column) for column in zip(*count.values(), strict=True))
    return "\n".join([*rows, f"{'all':<14}{total:>16,}{trained:>14,}{mixers:>14,}"])


def parameter_size(parameter: nn.Parameter) -> int:
    """Number of weights a parameter stands for: whole under ZeRO-3, unpacked where two 4-bit weights share a byte."""
    if hasattr(parameter, "quant_state") and parameter.quant_state is not None:
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
