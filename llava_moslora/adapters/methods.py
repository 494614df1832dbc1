"""Adapter methods that can be read, merged and exported: one row each, by ``peft_type`` of adapter_config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.fold import LowRank, Update
from llava_moslora.adapters.settings import PEFT_TYPE, stores_mixer
from llava_moslora.errors import Refusal
from llava_moslora.files.tensors import LazyTensor


@dataclass(frozen=True)
class Method:
    """What a method stores for an adapted linear, and what that adds to the linear's weight.

    Attributes:
        config: the class of its configuration.
        names: stored name of a tensor behind the linear's name, as PEFT or another implementation writes it → what it
            is, by a short name ("A").
        needed: of a configuration and a linear's name: the short names of all tensors that the linear must have.
        update: of those tensors by short name, the configuration and the linear's name: the :class:`Update`.
            Raises ``Refusal`` (K-ADAPTER) for shapes that do not fit the configuration.
    """

    config: type[PeftConfig]
    names: Mapping[str, str]
    needed: Callable[[PeftConfig, str], set[str]]
    update: Callable[[dict[str, LazyTensor], PeftConfig, str], Update]


def _moslora_needed(config: MosLoraConfig, module: str) -> set[str]:
    settings = config.settings_of(module)
    return {"A", "W", "B"} if stores_mixer(settings["mixer_init"], settings["train_mixer"]) else {"A", "B"}


def _moslora(tensors: dict[str, LazyTensor], config: MosLoraConfig, module: str) -> LowRank:
    settings = config.settings_of(module)
    rank = settings["r"]
    a, b = tensors["A"].shape, tensors["B"].shape
    expected = {"A": (rank, *a[1:2]), "W": (rank, rank), "B": (*b[:1], rank)}
    for part, tensor in tensors.items():
        if tensor.shape != expected[part]:
            what, found = f"shape of {part}", tensor.shape
            raise Refusal("K-ADAPTER", what, file=tensor.file, key=module, found=found, expected=expected[part])
    scaling = settings["lora_alpha"] / (math.sqrt(rank) if config.use_rslora else rank)
    return LowRank(tensors["A"], tensors.get("W"), tensors["B"], scaling)


def _plain_lora(tensors: dict[str, LazyTensor], config: MosLoraConfig, module: str) -> LowRank:
    """With an identity mixer, so that training can continue from it; ΔW is the same."""
    rank = config.settings_of(module)["r"]
    identity = tensors["A"].then(lambda a: torch.eye(rank, dtype=a.dtype), shape=(rank, rank))
    return _moslora(tensors | {"W": identity}, config, module)


LORA_NAMES = {"lora_A.weight": "A", "lora_B.weight": "B"}
METHODS: dict[str, Method] = {
    "LORA": Method(MosLoraConfig, LORA_NAMES, lambda config, module: {"A", "B"}, _plain_lora),
    # lora_AB: the reference repository's mixer; its PEFT fork and this package call it lora_mixer
    PEFT_TYPE: Method(
        MosLoraConfig,
        LORA_NAMES | {"lora_mixer.weight": "W", "lora_AB.weight": "W"},
        _moslora_needed,
        _moslora,
    ),
}
