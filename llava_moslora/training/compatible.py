"""Which optimizers and methods work with a DeepSpeed file; also used by the planner, so imports are light."""

from __future__ import annotations

from typing import Any

from llava_moslora.adapters.methods import METHODS
from llava_moslora.config import AdapterSettings
from llava_moslora.errors import Refusal
from llava_moslora.training.deepspeed_config import offloads_optimizer, zero_stage

# Optimizers whose state can be saved. ZeRO flattens and concatenates parameters: it can partition only state with one
# number per weight, not blocks of 8-bit numbers or factored rows, which belong to a parameter.
PER_WEIGHT = ("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "lion_32bit", "paged_lion_32bit", "sgd",
              "rmsprop", "rmsprop_bnb_32bit")  # fmt: skip
PER_PARAMETER = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit", "rmsprop_bnb",
                 "rmsprop_bnb_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit",
                 "adafactor")  # fmt: skip
OFFLOADABLE = ("adamw_torch", "adamw_torch_fused")  # in place of any other, DeepSpeed silently uses its Adam


def check_optimizer(name: str, deepspeed: dict[str, Any] | None) -> None:
    """Check that the optimizer's state can be saved: otherwise the first checkpoint would fail.

    Raises:
        Refusal: C-FLAG, it cannot.
    """
    known: tuple[str, ...] = PER_WEIGHT + PER_PARAMETER
    what, fix = "this optimizer's state cannot be saved", "--optim adamw_torch_fused, or another of these"
    if deepspeed and offloads_optimizer(deepspeed):
        known, what = OFFLOADABLE, "DeepSpeed replaces an offloaded optimizer by its Adam"
    elif deepspeed and zero_stage(deepspeed) and name in PER_PARAMETER:
        known, what = PER_WEIGHT, "ZeRO concatenates parameters, and cannot partition this optimizer's state"
        fix = "zero_configs/zero0.json, or one of these optimizers"
    if name not in known:
        expected = ", ".join(known)
        raise Refusal("C-FLAG", what, key="--optim", found=name, expected=expected, fix=fix)


def check_method_under(adapter: AdapterSettings, deepspeed: dict[str, Any] | None, file: object) -> None:
    """
    Args:
        deepspeed: the content of ``file``.

    Raises:
        Refusal: C-FLAG, a method that cannot be trained under ZeRO-3.
    """
    why = METHODS[adapter.method].not_under_zero3
    if why and deepspeed is not None and zero_stage(deepspeed) == 3:
        key, fix = f"--method {adapter.method}, --deepspeed {file}", "zero_configs/zero2.json"
        raise Refusal("C-FLAG", why, key=key, fix=fix)
