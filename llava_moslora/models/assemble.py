"""LLM folder + vision tower + projector → one LLaVA, and MoSLoRA adapters placed in both towers.

The composed model is built on the meta device and the loaded parts are grafted in, so that every part is loaded by its
own ``from_pretrained``: that is where DeepSpeed's ZeRO-3 partitions and bitsandbytes quantises.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlavaConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.errors import Refusal
from llava_moslora.files.json import read_json
from llava_moslora.models.attention import set_attention
from llava_moslora.models.llava import Llava
from llava_moslora.models.llava_folder import check_tower_is_taken
from llava_moslora.models.llm import llm_on_meta, load_llm, read_llm_config
from llava_moslora.models.names import ADAPTER_NAME, LLM, LM_HEAD, PROJECTOR, VISION_TOWER, part_of
from llava_moslora.models.projector import read_projector
from llava_moslora.models.towers import drop_unused, kind_of
from llava_moslora.models.vision import load_vision_tower, read_vision_config

APPENDED_TOKENS = 2  # the image placeholder and a padding token, where the tokenizer has none to spare

# What PEFT and the Trainer look for on the outermost model to know that a part of it is quantised.
_QUANTISATION_MARKS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")


@dataclass(frozen=True)
class TowerAdapter:
    """The adapter of one tower.

    ``target_modules`` are suffixes of linears; empty: every linear of every layer. The LLM's ``lm_head`` is adapted
    only where it is named (XTuner does so for InternLM2, whose head is called ``output``).
    """

    r: int
    lora_alpha: float
    lora_dropout: float = 0.05
    mixer_init: str = "kaiming_uniform"
    train_mixer: bool = True
    target_modules: tuple[str, ...] = ()


def tokens_per_image(vision_config) -> int:
    """Placeholders per image: patches without the class token."""
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
    llm_dtype: torch.dtype | None = None,
    attention: str = "sdpa",
) -> tuple[Llava, dict]:
    """The composed model in ``dtype``, everything frozen.

    Args:
        llm_folder: a causal LM's folder (:mod:`llava_moslora.models.llm`): LLaMA, Vicuna, InternLM2, Qwen, Mistral, …
        vision_tower: a CLIP or SigLIP folder or ``open_clip:ARCH@FILE`` (:mod:`llava_moslora.models.vision`).
        projector: a pretrained projector (:mod:`llava_moslora.models.projector`), or None for a new one.
            A complete LLaVA's folder may stand for each of the three.
        tokenizer: with the image placeholder; where it has more tokens than the LLM has rows, the LLM gets rows.
        image_token_id: the placeholder's id.
        bits: 16, or 4 for an NF4 LLM (double quantisation, compute in ``dtype``).
        llm_dtype: of the LLM, if not ``dtype``.
        attention: one of :data:`llava_moslora.models.attention.IMPLEMENTATIONS`, in the LLM and in the vision tower.

    Returns:
        The model and the tower's image-processor settings (what ``preprocessor_config.json`` holds).

    Raises:
        Refusal: a part is missing, damaged, or does not fit the others; known before a weight of a tower is read.
    """
    llm_config, vision_config = read_llm_config(llm_folder), read_vision_config(vision_tower)
    check_tower_is_taken(Path(llm_folder), vision_tower)
    _check_tokens(tokenizer, image_token_id, llm_config, Path(llm_folder))
    tensors = None
    if projector is not None:
        tensors = read_projector(projector, vision_config.hidden_size, llm_config.hidden_size)
    vision, preprocessor = load_vision_tower(vision_tower, dtype=dtype)
    llm = load_llm(llm_folder, llm_dtype or dtype, bits)
    _add_token_rows(llm, len(tokenizer))
    model = _compose(llm, vision, image_token_id, tokenizer.pad_token_id, dtype)
    model.model.multi_modal_projector = _make_projector(model.config, tensors, dtype, llm)
    set_attention(model, attention)
    left = [name for name, p in model.named_parameters() if p.is_meta]
    assert not left, f"grafting left parameters on the meta device: {left[:4]}"
    return model.requires_grad_(False), preprocessor


def model_on_meta(
    llm_config: PreTrainedConfig,
    vision_config: PreTrainedConfig,
    llm: TowerAdapter | None,
    vision: TowerAdapter | None,
    dtype: torch.dtype = torch.bfloat16,
) -> PeftModel | Llava:
    """The model that :func:`assemble` and :func:`add_adapters` would make, every tensor on the meta device.

    For sizes on paper: made in seconds, whatever the size, without memory. Without adapters it is stage 1's model.
    """
    sketch = llm_on_meta(llm_config, Path(llm_config.name_or_path))
    with torch.device("meta"):
        tower = kind_of(vision_config).model(vision_config)
        model = _compose(sketch, tower, 0, None, dtype).requires_grad_(False)
        trained = train_projector_only(model) if llm is vision is None else add_adapters(model, llm, vision)
        return trained.to(dtype)


def _compose(llm: PreTrainedModel, vision: PreTrainedModel, image_token_id, pad_token_id, dtype: torch.dtype) -> Llava:
    """LLM and tower in one LLaVA; its projector is still on the meta device."""
    config = LlavaConfig(
        text_config=llm.config,
        vision_config=vision.config,
        image_token_index=image_token_id,
        image_seq_length=tokens_per_image(vision.config),
        # hidden_states[-2] named from the front: the last layer is not needed and is cut off below, and an index
        # from the end would then mean another layer.
        vision_feature_layer=vision.config.num_hidden_layers - 1,
        vision_feature_select_strategy=kind_of(vision.config).strategy,
        pad_token_id=pad_token_id,
        dtype=dtype,
    )
    with torch.device("meta"), set_zero3_state():  # the frame only: its parts are replaced, nothing to partition
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


def _check_tokens(tokenizer, image_token_id: int, config: PreTrainedConfig, folder: Path) -> None:
    """Refuse a tokenizer that was not made for this LLM, as far as numbers can tell."""
    fix = "give the LLM's own folder, tokenizer files included"
    if not 0 <= image_token_id < len(tokenizer):
        raise Refusal(
            "K-TOKENIZER", "the image placeholder is no token of the tokenizer", file=folder, key="<image>",
            found=image_token_id, expected=f"below {len(tokenizer)}", fix=fix,
        )  # fmt: skip
    if len(tokenizer) > config.vocab_size + APPENDED_TOKENS:
        raise Refusal(
            "K-TOKENIZER", "the tokenizer has more tokens than the LLM has rows", file=folder, key="vocab_size",
            found=len(tokenizer), expected=f"at most {config.vocab_size} and {APPENDED_TOKENS} appended", fix=fix,
        )  # fmt: skip
    raw = read_json(folder / "config.json")
    bos = raw.get("bos_token_id", raw.get("text_config", {}).get("bos_token_id"))  # not the class's default
    if None not in (bos, tokenizer.bos_token_id) and bos != tokenizer.bos_token_id:
        raise Refusal(
            "K-TOKENIZER", "the tokenizer begins texts with another token than the LLM", file=folder,
            key="bos_token_id", found=tokenizer.bos_token_id, expected=bos, fix=fix,
        )  # fmt: skip


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
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    from deepspeed import zero  # imported here: it takes seconds, and inference never needs it

    return zero.GatheredParameters(partitioned, modifier_rank=0)


def _make_projector(config: LlavaConfig, tensors: dict | None, dtype: torch.dtype, llm: PreTrainedModel) -> nn.Module:
    projector = LlavaMultiModalProjector(config)
    if tensors is not None:
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

    Layers whose output is never used (the tower's last) are not in the model, so no adapter is ever without
    gradient. All trainable tensors get the model's dtype: ZeRO-3 asserts a single one.

    Raises:
        Refusal: a target that matches no linear; whatever :class:`MosLoraConfig` refuses.
    """
    towers = {LLM: llm, VISION_TOWER: vision}
    for tower, spec in towers.items():
        if spec is not None:
            _check_rank(model, tower, spec)
    regexes = {tower: _target_regex(model, tower, spec) for tower, spec in towers.items() if spec is not None}
    if not regexes:
        raise Refusal("C-FLAG", "no adapter asked for", key="--lora_r", fix="give --lora_r or --vision_lora_r above 0")
    main = next(spec for spec in towers.values() if spec is not None)
    own = {f"{re.escape(VISION_TOWER)}\\..*": vision} if main is llm and vision is not None else {}
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
    if vision is not None and is_deepspeed_zero3_enabled():
        # ZeRO-3 frees an adapted layer's weights by a backward hook on its inputs. The images ask for no gradient,
        # and on inputs without one torch fires that hook before the layer's backward instead of after it.
        model.model.vision_tower.enable_input_require_grads()
    return get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)


def _check_rank(model: nn.Module, tower: str, spec: TowerAdapter) -> None:
    """A rank above a linear's smaller side adds parameters and no ΔW that a lower one would not reach."""
    wanted = [re.compile(rf"(?:.*\.)?{re.escape(name)}") for name in spec.target_modules]
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) and name.startswith(tower + ".")):
            continue
        smaller = min(module.in_features, module.out_features)
        if spec.r > smaller and (not wanted or any(pattern.fullmatch(name) for pattern in wanted)):
            raise Refusal(
                "C-RANK",
                f"the rank is above the smaller side of {name}",
                key="--vision_lora_r" if tower == VISION_TOWER else "--lora_r",
                found=f"{spec.r} for {module.in_features} → {module.out_features}",
                expected=f"at most {smaller}",
                fix="lower it, or name other linears: --lora_target_modules, --vision_lora_target_modules",
            )


def _target_regex(model: nn.Module, tower: str, spec: TowerAdapter) -> str:
    available = linear_suffixes(model, tower)
    wanted = list(spec.target_modules) or available
    chosen = []
    head = tower == LLM and LM_HEAD in wanted
    if head:
        wanted.remove(LM_HEAD)
    for name in wanted:
        matches = [suffix for suffix in available if suffix == name or suffix.endswith("." + name)]
        if not matches:
            raise Refusal(
                "C-TARGET",
                "no linear of this tower has that name",
                key="--vision_lora_target_modules" if tower == VISION_TOWER else "--lora_target_modules",
                found=name,
                expected="some of " + ", ".join(available),
            )
        chosen += matches
    names = "|".join(re.escape(name) for name in dict.fromkeys(chosen))
    regexes = [rf"{re.escape(tower)}\.(?:encoder\.)?layers\.\d+\.(?:{names})"] if chosen else []
    return "|".join(regexes + [LM_HEAD] * head)


def train_projector_only(model: Llava) -> Llava:
    """Stage 1: everything frozen but the projector."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def describe(model: nn.Module) -> str:
    """One line per part: parameters in all, trained, of them adapter and mixer; counts hold under ZeRO-3 too."""
    titles = {"llm": "LLM", "vision_tower": "vision tower", "projector": "projector", "lm_head": "LM head"}
    count = {part: [0, 0, 0] for part in titles}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # PEFT keeps the projector as it was loaded, beside the trained copy
            continue
        part = part_of(name)
        size = parameter_size(parameter)
        count[part][0] += size
        count[part][1] += size if parameter.requires_grad else 0
        count[part][2] += size if parameter.requires_grad and "lora_mixer" in name else 0
    rows = [f"{'part':<14}{'parameters':>16}{'trained':>14}{'of it mixers':>14}"]
    rows += [f"{titles[part]:<14}{n:>16,}{trained:>14,}{mixers:>14,}" for part, (n, trained, mixers) in count.items()]
    total, trained, mixers = (sum(column) for column in zip(*count.values(), strict=True))
    return "\n".join([*rows, f"{'all':<14}{total:>16,}{trained:>14,}{mixers:>14,}"])


def parameter_size(parameter: nn.Parameter) -> int:
    """Number of weights a parameter stands for: whole under ZeRO-3, unpacked where two 4-bit weights share a byte."""
    if hasattr(parameter, "quant_state") and parameter.quant_state is not None:
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
