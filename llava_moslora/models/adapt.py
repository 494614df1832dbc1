"""Makes an assembled model trainable: adapters in LLM and vision tower, and the projector; in stage 1 only that."""

from __future__ import annotations

import re

from peft import PeftModel, get_peft_model
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_moslora.adapters.methods import method_config
from llava_moslora.adapters.shared_input import share_inputs
from llava_moslora.config import AdapterSettings, TowerAdapter
from llava_moslora.errors import Refusal
from llava_moslora.models.llava import Llava, TextLlm
from llava_moslora.models.names import ADAPTER_NAME, LLM, LLM_ALONE, LM_HEAD, PROJECTOR, VISION_TOWER, part_of

FLAG_PREFIX = {LLM: "--", LLM_ALONE: "--", VISION_TOWER: "--vision_"}


def add_adapters(model: Llava | TextLlm, settings: AdapterSettings) -> PeftModel:
    """One adapter of ``settings.method`` over the whole model, with patterns for the vision tower's settings, and the
    full projector. For a text-only LLM (``settings.vision`` must be None), its adapter.

    The tower's unused last layer is not in the model, so every adapter gets a gradient. All trainable tensors get the
    model's dtype: ZeRO-3 asserts a single one.

    Raises:
        Refusal: C-FLAG, no adapter; C-TARGET, a target that matches no linear layer; C-RANK, a rank above a linear
            layer's smaller dimension; whatever the configuration of the method refuses.
    """
    text_only = isinstance(model, TextLlm)
    asked = ((LLM_ALONE if text_only else LLM, settings.llm), (VISION_TOWER, settings.vision))
    towers = {tower: adapter for tower, adapter in asked if adapter is not None}
    for tower, adapter in towers.items():
        _check_rank(model, tower, adapter)
    if not towers:
        raise Refusal("C-FLAG", "no adapter to train", key="--lora_r", fix="give --lora_r or --vision_lora_r above 0")
    main, *others = towers.values()
    config = method_config(
        settings.method, main, {rf"{re.escape(VISION_TOWER)}\..*": other for other in others},
        target_modules="|".join(_target_regex(model, tower, adapter) for tower, adapter in towers.items()),
        modules_to_save=None if text_only else [PROJECTOR],
    )  # fmt: skip
    if VISION_TOWER in towers and is_deepspeed_zero3_enabled():
        # ZeRO-3 frees an adapted layer's weights by a backward hook on its inputs. Images require no gradient, and for
        # inputs without one torch fires that hook before the layer's backward instead of after it.
        model.model.vision_tower.enable_input_require_grads()
    if text_only and is_deepspeed_zero3_enabled():
        model.enable_input_require_grads()  # as above: word embeddings require no gradient either
    adapted = get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    share_inputs(adapted)
    return adapted


def train_projector_only(model: Llava) -> Llava:
    """Stage 1: everything frozen except the projector."""
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def linear_suffixes(model: nn.Module, tower: str) -> list[str]:
    """Names of the linear layers in the blocks of ``tower``, without the block: ``self_attn.q_proj``, ``mlp.fc1`` …"""
    pattern = re.compile(rf"{re.escape(tower)}\.(?:encoder\.)?layers\.\d+\.(.+)")
    found = {
        m[1]: None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (m := pattern.fullmatch(name))
    }
    return list(found)


def _check_rank(model: nn.Module, tower: str, adapter: TowerAdapter) -> None:
    """A rank above a linear layer's smaller dimension adds parameters but no expressiveness."""
    wanted = [re.compile(rf"(?:.*\.)?{re.escape(name)}") for name in adapter.target_modules]
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) and name.startswith(tower + ".")):
            continue
        smaller = min(module.in_features, module.out_features)
        if adapter.r > smaller and (not wanted or any(pattern.fullmatch(name) for pattern in wanted)):
            raise Refusal(
                "C-RANK", f"the rank is above a dimension of {name}", key=f"{FLAG_PREFIX[tower]}lora_r",
                found=f"{adapter.r} for {module.in_features} → {module.out_features}", expected=f"at most {smaller}",
                fix="lower it, or choose other linear layers: --lora_target_modules, --vision_lora_target_modules",
            )  # fmt: skip


def _target_regex(model: nn.Module, tower: str, adapter: TowerAdapter) -> str:
    """Which modules get the adapter, as PEFT's ``target_modules`` takes it."""
    available = linear_suffixes(model, tower)
    wanted = list(adapter.target_modules) or available
    regexes, chosen = [], []
    if tower != VISION_TOWER and LM_HEAD in wanted:
        wanted.remove(LM_HEAD)
        regexes = [LM_HEAD]
    for name in wanted:
        matches = [suffix for suffix in available if suffix == name or suffix.endswith("." + name)]
        if not matches:
            raise Refusal(
                "C-TARGET", "no linear layer has that name", key=f"{FLAG_PREFIX[tower]}lora_target_modules",
                found=name, expected="some of " + ", ".join(available),
            )  # fmt: skip
        chosen += matches
    if chosen:
        names = "|".join(re.escape(name) for name in dict.fromkeys(chosen))
        regexes.insert(0, rf"{re.escape(tower)}\.(?:encoder\.)?layers\.\d+\.(?:{names})")
    return "|".join(regexes)


def parameter_table(model: nn.Module) -> str:
    """A row per part: all parameters, trained ones, and mixer parameters; correct under ZeRO-3 too."""
    titles = {"llm": "LLM", "vision_tower": "vision tower", "projector": "projector", "lm_head": "LM head"}
    titles |= {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "text encoder 2"}
    count = {part: [0, 0, 0] for part in titles}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # PEFT keeps the original projector next to the trained copy
            continue
        part = part_of(name)
        size = parameter_size(parameter)
        count[part][0] += size
        count[part][1] += size if parameter.requires_grad else 0
        count[part][2] += size if parameter.requires_grad and "lora_mixer" in name else 0
    rows = [f"{'part':<14}{'parameters':>16}{'trained':>14}{'mixers':>14}"]
    found = {titles[part]: counts for part, counts in count.items() if counts[0]}
    rows += [f"{title:<14}{n:>16,}{trained:>14,}{mixers:>14,}" for title, (n, trained, mixers) in found.items()]
    total, trained, mixers = (sum(column) for column in zip(*count.values(), strict=True))
    return "\n".join([*rows, f"{'all':<14}{total:>16,}{trained:>14,}{mixers:>14,}"])


def parameter_size(parameter: nn.Parameter) -> int:
    """Number of weights in a parameter, partitioned by ZeRO-3 or not; a byte of 4-bit weights counts as two."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())
