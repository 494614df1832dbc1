"""``MosLoraConfig``: a PEFT LoRA configuration with a mixer, for stock PEFT on any model.

    from peft import get_peft_model
    from llava_moslora import MosLoraConfig

    model = get_peft_model(model, MosLoraConfig(r=64, lora_alpha=128, target_modules=["q_proj", "v_proj"]))

In memory the adapter is an ordinary PEFT LoRA (``peft_type`` LORA), so that everything that knows LoRA works. On disk
its configuration has ``"peft_type": "MOSLORA"``: importing this module registers that name, and a PEFT without it
stops with a KeyError instead of computing B·A without the mixer.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft.import_utils import is_bnb_available
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from llava_moslora.adapters.layers import MosLoraLinear, UnsupportedModule
from llava_moslora.adapters.mixer_config import MixerConfig
from llava_moslora.adapters.settings import PEFT_TYPE
from llava_moslora.errors import Refusal


@dataclass
class MosLoraConfig(MixerConfig):
    """LoRA with a mixer: ΔW = s·B·W·A with s = lora_alpha / r (paper eq. 7, in PyTorch's orientation).

    All of :class:`peft.LoraConfig` (``r``, ``lora_alpha``, ``lora_dropout``, ``target_modules``, ``modules_to_save``,
    ``use_rslora`` …), and ``mixer_init``, ``train_mixer``, ``dropout_pattern``, ``mixer_init_pattern`` and
    ``train_mixer_pattern``. A pattern maps a module name or a regular expression to a value, with the rules of PEFT's
    ``rank_pattern``: it is matched against the end of the module's name, the first match wins.

    Raises:
        Refusal: C-MIXER, C-RANK, C-ALPHA, C-DROPOUT for a value out of range, C-ADAPTER for a combination without
            meaning, C-TARGET (when the adapter is put into a model) for a target or pattern that matches no module.
    """

    def __post_init__(self):
        super().__post_init__()
        self._register_custom_module(layer_classes())

    def to_dict(self) -> dict:
        """As stored: ``peft_type`` is MOSLORA, so that nothing reads the file as a LoRA without a mixer."""
        stored = {**super().to_dict(), "peft_type": PEFT_TYPE}
        return {k: sorted(v) if isinstance(v, set) else v for k, v in stored.items()}  # sets have no order of their own

    @classmethod
    def from_peft_type(cls, **kwargs) -> MosLoraConfig:
        """Build from stored attributes.

        Raises:
            Refusal: K-ADAPTER if the attributes are those of another kind of adapter (PEFT would return that kind).
        """
        if kwargs.get("peft_type") != PEFT_TYPE:
            raise Refusal(
                "K-ADAPTER",
                "not the configuration of a MoSLoRA adapter in training form",
                key="peft_type",
                found=kwargs.get("peft_type"),
                expected=PEFT_TYPE,
                fix="convert the folder: python scripts/convert_adapter.py",
            )
        return super().from_peft_type(**kwargs)


def layer_classes() -> dict[type[nn.Module], type]:
    """Base layer → our layer, for ``LoraConfig._register_custom_module``; the first match wins.

    The order matters: bitsandbytes' classes inherit from ``nn.Linear``.
    """
    quantised = {}
    if is_bnb_available():
        from llava_moslora.adapters.bnb import LAYER_CLASSES as quantised  # imported here: it needs bitsandbytes

    return {**quantised, nn.Linear: MosLoraLinear, nn.Module: UnsupportedModule}


# A plain dict entry: PEFT's register_peft_method needs a member of its PeftType enumeration and a tuner class, and this
# adapter must stay an ordinary LORA in memory.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MosLoraConfig
