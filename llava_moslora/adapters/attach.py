"""Putting an adapter that was read from a file into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from llava_moslora.adapters.fold import Adapter, named_tensors
from llava_moslora.adapters.rename import rename_adapter
from llava_moslora.errors import Refusal, few

VIT_LEVEL = "vision_model."  # the level in CLIPVisionModel's names that transformers 5.6 removed


def for_model(adapter: Adapter, module_names: Iterable[str]) -> Adapter:
    """The adapter under the names of a model at hand: ViT names of transformers 4 and 5 stand for each other.

    Raises:
        Refusal: K-ADAPTER naming the first layers that the model does not have.
    """
    present = set(module_names)
    bare = {name.replace(VIT_LEVEL, "", 1): name for name in present}
    names = {name: name if name in present else bare.get(name.replace(VIT_LEVEL, "", 1)) for name in adapter.layers}
    if missing := [name for name, found in names.items() if found is None]:
        raise Refusal(
            "K-ADAPTER",
            f"{len(missing)} of {len(names)} adapted layers are not in the model",
            found=few(missing),
            expected=f"names such as {few(sorted(present))}",
            fix="pass rename with the prefixes of the file and of the model",
        )
    if all(old == new for old, new in names.items()):
        return adapter
    return rename_adapter(adapter, lambda name: names.get(name, name))


def attach(model: nn.Module, adapter: Adapter, adapter_name: str = "default", is_trainable: bool = False) -> PeftModel:
    """Put an adapter into a model: as ``PeftModel.from_pretrained``, with nothing missing and nothing left over.

    Args:
        model: the base model, or a PeftModel that gets one adapter more.

    Raises:
        Refusal: K-ADAPTER naming the first tensors that the model or the adapter lacks.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    adapter = for_model(adapter, [name.replace(".base_layer", "") for name, _ in base.named_modules()])
    config = copy.deepcopy(adapter.config)
    config.inference_mode = not is_trainable
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name)
    tensors = {name: tensor.read() for name, tensor in named_tensors(adapter).items()}
    result = set_peft_model_state_dict(model, tensors, adapter_name)
    missing = [key for key in result.missing_keys if f".{adapter_name}." in key]
    if missing:
        raise Refusal("K-ADAPTER", f"{len(missing)} missing tensors", expected=few(missing))
    if unexpected := result.unexpected_keys:
        raise Refusal("K-ADAPTER", f"{len(unexpected)} unexpected tensors", found=few(unexpected))
    return model
