"""An adapter's settings: the check of each, and the field that sets it per module. No torch, no PEFT."""

from __future__ import annotations

import math
import re

from llava_moslora.config import MIXER_INITS
from llava_moslora.errors import Refusal

PEFT_TYPE = "MOSLORA"  # ``peft_type`` in adapter_config.json
# Everything that replaces B·A, changes the base weight by B·A, or adds a second factor next to it, has no meaning (or
# another one) with a mixer in between. PEFT's own LoRA variants are recognised by a mark in their field's metadata.
NO_MEANING = ("lora_bias", "fan_in_fan_out", "use_qalora", "loftq_config", "megatron_config", "target_parameters",
              "ensure_weight_tying")  # fmt: skip
# setting → the field that maps module patterns to its values
PATTERN_FIELDS = {
    "r": "rank_pattern",
    "lora_alpha": "alpha_pattern",
    "lora_dropout": "dropout_pattern",
    "mixer_init": "mixer_init_pattern",
    "train_mixer": "train_mixer_pattern",
}


def check_setting(setting: str, key: str, value: object) -> None:
    """Refuse a value that ``setting``, one of :data:`PATTERN_FIELDS`, cannot have; ``key`` is where it was given.

    Raises:
        Refusal: C-RANK, C-ALPHA, C-DROPOUT or C-MIXER.
    """
    _CHECKS[setting](key, value)


def check_pattern(key: str, pattern: object) -> None:
    """
    Raises:
        Refusal: C-TARGET, not a regular expression.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise Refusal("C-TARGET", f"not a regular expression: {error}", key=key, found=pattern) from error


def check_even_rank(key: str, rank: int) -> None:
    """
    Raises:
        Refusal: C-RANK, a butterfly mixer of an odd rank.
    """
    if rank % 2:
        raise Refusal("C-RANK", "the butterfly mixer pairs halves of the rank", key=key, found=rank, expected="even")


def stores_mixer(mixer_init: str, train_mixer: bool) -> bool:
    """A frozen identity is plain LoRA: no W is stored or computed."""
    return train_mixer or mixer_init != "identity"


def _check_rank(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refusal("C-RANK", "the rank is a positive whole number", key=key, found=value, expected="1 or more")


def _check_alpha(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise Refusal("C-ALPHA", "lora_alpha is a positive number", key=key, found=value, expected="above 0")


def _check_dropout(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise Refusal("C-DROPOUT", "the dropout is a probability below 1", key=key, found=value, expected="0 ≤ p < 1")


def _check_mixer_init(key: str, value: object) -> None:
    if value == "zeros":
        raise Refusal(
            "C-MIXER",
            "a zero mixer over a zero B gives A, W and B zero gradients, so nothing ever trains (paper, Appendix C)",
            key=key,
            found=value,
            expected=", ".join(sorted(MIXER_INITS)),
            fix="use kaiming_uniform or orthogonal (paper, Table 3)",
        )
    if value not in MIXER_INITS:
        raise Refusal("C-MIXER", "unknown mixer init", key=key, found=value, expected=", ".join(sorted(MIXER_INITS)))


def _check_train_mixer(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise Refusal("C-MIXER", "train_mixer is true or false", key=key, found=value, expected="true or false")


_CHECKS = {
    "r": _check_rank,
    "lora_alpha": _check_alpha,
    "lora_dropout": _check_dropout,
    "mixer_init": _check_mixer_init,
    "train_mixer": _check_train_mixer,
}
