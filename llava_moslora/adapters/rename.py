"""An adapter under other names: its modules and parameters, and a configuration that names each layer."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.fold import Adapter
from llava_moslora.adapters.settings import PATTERN_FIELDS
from llava_moslora.errors import Refusal, few

# Of a configuration, what names modules; and what patterns set per module.
_NAMING = {"peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_PER_MODULE = {*PATTERN_FIELDS, *PATTERN_FIELDS.values()}


def rename_adapter(adapter: Adapter, new_name: Callable[[str], str]) -> Adapter:
    """The adapter with every name passed through ``new_name``, and a configuration that names the layers one by one.

    Raises:
        Refusal: K-ADAPTER, two layers would get the same name, or the method is neither LoRA nor MoSLoRA.
    """
    config = adapter.config
    if not isinstance(config, MosLoraConfig):
        raise Refusal("K-ADAPTER", "names of this adapter method cannot be changed", found=type(config).__name__)
    layers = {new_name(name): layer for name, layer in adapter.layers.items()}
    if len(layers) < len(adapter.layers):
        same = [name for name, count in Counter(map(new_name, adapter.layers)).items() if count > 1]
        raise Refusal("K-ADAPTER", "two layers get the same name", found=few(same))
    names = [f.name for f in dataclasses.fields(config) if f.name not in _NAMING | _PER_MODULE]
    settings = {new_name(name): config.settings_of(name) for name in adapter.layers}
    others = {new_name(name): tensor for name, tensor in adapter.others.items()}
    return Adapter(config_of(settings, {name: getattr(config, name) for name in names}), layers, others)


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """``name`` with the longest of the ``prefixes`` (old → new) that it begins with replaced."""
    fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
    if not fitting:
        return name
    prefix = max(fitting, key=len)
    return prefixes[prefix] + name[len(prefix) :]


def config_of(settings: dict[str, dict], common: dict) -> MosLoraConfig:
    """The configuration that gives every layer its settings: the most frequent ones, and patterns for the others.

    Args:
        settings: layer → setting → value, as of :meth:`MixerConfig.settings_of`.
        common: the configuration's other fields.
    """
    common = dict(common)
    for setting, pattern_field in PATTERN_FIELDS.items():
        values = {name: own[setting] for name, own in settings.items()}
        common[setting] = Counter(values.values()).most_common(1)[0][0]
        common[pattern_field] = exact_patterns({n: value for n, value in values.items() if value != common[setting]})
    return MosLoraConfig(**common, target_modules=sorted(settings))


def exact_patterns(values: dict[str, object]) -> dict[str, object]:
    """Module name → value, as patterns that match these names only."""
    return {re.escape(name): value for name, value in values.items()}
