"""Reading an adapter in every spelling there is, without a model and without executing anything from the file::

    read_adapter("adapter")                                               # ours, the reference's, plain LoRA
    read_adapter("iter_1.pth", lora_alpha={"llm.": 128, "visual_encoder.": 16}, rename={"llm.": ""})  # XTuner's

What is missing, unexpected or of unknown meaning stops the reading: a mixer that is silently left out gives a model
that runs and is wrong.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.other import EMBEDDING_LAYER_NAMES, get_pattern_key
from safetensors.torch import load_file
from torch import nn

from llava_moslora.adapters.config import PEFT_NAME, SETTINGS, MosLoraConfig, stores_mixer
from llava_moslora.adapters.fold import PEFT_PREFIX, Adapter, LowRank, named_tensors
from llava_moslora.errors import Refusal

# Saved names end in lora_A.weight, live ones (XTuner's .pth) carry the adapter's name: lora_A.default.weight. The
# mixer is lora_AB in the reference repository, lora_mixer in its PEFT fork and here.
LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|AB|mixer)(?:\.(?P<adapter>[^.]+))?\.weight")
PARTS = {"A": "A", "B": "B", "AB": "W", "mixer": "W"}
FORK_INITS = {True: "kaiming_uniform", "kai": "kaiming_uniform", "orth": "orthogonal"}
VIT_LEVEL = "vision_model."  # the level of CLIPVisionModel's names that transformers 5.6 took away


def read_adapter(
    path: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    lora_alpha: float | Mapping[str, float] | None = None,
) -> Adapter:
    """Read an adapter in any spelling: ours, the reference repository's, its PEFT fork's, XTuner's, plain LoRA.

    A plain LoRA gets a trainable identity mixer, to continue training from it; it computes what it computed.

    Args:
        path: an adapter folder, or one weight file without a configuration (XTuner's ``iter_N.pth``).
        rename: prefix of the names in the file → prefix in the model, such as ``{"llm.": "model.language_model."}``;
            of several that fit, the longest counts.
        lora_alpha: for a file without a configuration, the alpha it was trained with, or prefix in the file → alpha.

    Raises:
        Refusal: K-ADAPTER for anything missing, unexpected, of the wrong shape or of unknown meaning.
    """
    path = Path(path)
    pieces, others = _sort(_read_tensors(path), path)
    _refuse_incomplete(pieces, path)
    if path.is_dir():
        try:
            config, pieces = _config_as_stored(_read_json(path / "adapter_config.json"), pieces, path)
        except (TypeError, ValueError) as error:  # PEFT's own checks
            if isinstance(error, Refusal):
                raise
            raise Refusal("K-ADAPTER", f"a setting that PEFT refuses: {error}", file=path) from error
        _check_complete(config, pieces, others, path)
    else:
        config = _config_of({name: _settings_of(name, p, lora_alpha, path) for name, p in pieces.items()}, {})
    layers = {}
    for name, p in pieces.items():
        settings = config.settled(name)
        layers[name] = LowRank(p["A"], p.get("W"), p["B"], _scaling(config, settings))
        _check_shapes(name, layers[name], settings["r"], path)
    adapter = Adapter(config, layers, others)
    return adapter if rename is None else _renamed(adapter, lambda name: _replace_prefix(name, rename))


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
            found=_few(missing),
            expected=f"names such as {_few(sorted(present))}",
            fix="pass rename with the prefixes of the file and of the model",
        )
    return adapter if all(k == v for k, v in names.items()) else _renamed(adapter, lambda name: names.get(name, name))


def attach(model: nn.Module, adapter: Adapter, adapter_name: str = "default", is_trainable: bool = False) -> PeftModel:
    """Put an adapter into a model: what ``PeftModel.from_pretrained`` does, with nothing missing and nothing left over.

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
    load = set_peft_model_state_dict(model, named_tensors(adapter), adapter_name)
    missing = [key for key in load.missing_keys if f".{adapter_name}." in key]
    for names, which in ((missing, "missing"), (load.unexpected_keys, "unexpected")):
        if names:
            raise Refusal("K-ADAPTER", f"{len(names)} {which} tensors", found=_few(names))
    return model


def _read_json(path: Path) -> dict:
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        raise Refusal("K-ADAPTER", "no adapter here", file=path.parent, expected=path.name) from None
    except (ValueError, OSError) as error:
        raise Refusal("K-ADAPTER", "cannot be read as JSON", file=path, found=error) from error
    if not isinstance(stored, dict):
        raise Refusal("K-ADAPTER", "not an adapter's configuration", file=path, found=type(stored).__name__)
    return stored


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's weight file or of ``path`` itself; a pickle only with ``weights_only``."""
    file = path
    if path.is_dir():
        file = path / "adapter_model.safetensors"
        if not file.exists():
            file = path / "adapter_model.bin"
    if not file.exists():
        raise Refusal("K-ADAPTER", "no adapter weights here", file=path, expected="adapter_model.safetensors")
    try:
        tensors = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # safetensors and torch.load share no error type, and a damaged file can raise any
        raise Refusal("K-ADAPTER", "the weights cannot be read", file=file, found=error) from error
    tensors = tensors.get("state_dict", tensors)  # mmengine wraps the weights
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise Refusal("K-ADAPTER", "not a file of named tensors", file=file, found=_few(tensors))
    return tensors


def _sort(tensors: dict[str, torch.Tensor], path: Path) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """Module → {A, W, B} as far as there, and the tensors that belong to no low-rank pair."""
    pieces, others, adapters, unknown = {}, {}, set(), []
    for name, tensor in tensors.items():
        bare = name.replace(PEFT_PREFIX, "", 1)
        if match := LOW_RANK.fullmatch(bare):
            pieces.setdefault(match["module"], {})[PARTS[match["part"]]] = tensor
            adapters.add(match["adapter"])
        elif ".lora_" in bare:
            unknown.append(name)
        else:
            others[bare] = tensor
    if unknown:
        raise Refusal(
            "K-ADAPTER",
            f"{len(unknown)} unexpected tensors",
            file=path,
            found=_few(unknown),
            expected="lora_A, lora_B and a mixer (lora_mixer or lora_AB)",
        )
    if len(adapters) > 1:
        raise Refusal("K-ADAPTER", "several adapters in one file", file=path, found=_few(sorted(map(str, adapters))))
    if not pieces:
        raise Refusal(
            "K-ADAPTER", "no LoRA tensors in it", file=path, found=_few(tensors), expected="names with lora_A"
        )
    return pieces, others


def _refuse_incomplete(pieces: dict[str, dict], path: Path) -> None:
    missing = [f"{name}.lora_{part}" for name, p in pieces.items() for part in "AB" if part not in p]
    if missing:
        raise Refusal("K-ADAPTER", f"{len(missing)} missing tensors", file=path, expected=_few(missing))


def _config_as_stored(stored: dict, pieces: dict[str, dict], path: Path) -> tuple[MosLoraConfig, dict[str, dict]]:
    """The configuration, whoever wrote it, and the pieces, completed by identity mixers for a plain LoRA."""
    stored = dict(stored)
    kind = stored.pop("peft_type", None)
    if kind not in (PEFT_NAME, "LORA"):
        raise Refusal(
            "K-ADAPTER", "not a LoRA", file=path, key="peft_type", found=kind, expected=f"{PEFT_NAME} or LORA"
        )
    reference, pattern = stored.pop("lora_use_mixer", False), stored.pop("lora_use_mixer_pattern", None) or {}
    fork = stored.pop("use_moslora", False)
    known = {f.name for f in dataclasses.fields(MosLoraConfig)}
    # Other versions of PEFT have other fields. One that is empty changes nothing; one that is set might.
    if foreign := [key for key in stored if key not in known and stored[key] and key != "runtime_config"]:
        raise Refusal("K-ADAPTER", "settings of unknown meaning", file=path, key=_few(foreign), fix="upgrade peft")
    stored = {key: value for key, value in stored.items() if key in known}
    if kind == PEFT_NAME:
        return MosLoraConfig(**stored), pieces
    if reference or pattern or fork:
        if fork not in (False, *FORK_INITS):
            raise Refusal(
                "K-ADAPTER", "unknown mixer", file=path, key="use_moslora", found=fork, expected=list(FORK_INITS)
            )
        stored["mixer_init"] = FORK_INITS.get(fork, "kaiming_uniform")
        mixes = {name: pattern.get(get_pattern_key(pattern.keys(), name), reference or fork) for name in pieces}
        return _without_mixer(stored, [name for name in pieces if not mixes[name]]), pieces
    if mixers := [name for name, p in pieces.items() if "W" in p]:
        raise Refusal(
            "K-ADAPTER",
            f"{len(mixers)} mixers, but the configuration says plain LoRA: B·A would be wrong",
            file=path,
            found=_few(mixers),
            fix=f'restore the configuration, or set "lora_use_mixer": true in {path / "adapter_config.json"}',
        )
    eyes = {name: {**p, "W": torch.eye(len(p["A"]), dtype=p["A"].dtype)} for name, p in pieces.items()}
    return MosLoraConfig(**{**stored, "mixer_init": "identity"}), eyes


def _without_mixer(kept: dict, names: list[str]) -> MosLoraConfig:
    """The configuration ``kept`` with a frozen identity, that is no mixer, in the layers ``names``."""
    frozen = {
        "mixer_init_pattern": dict.fromkeys(names, "identity"),
        "train_mixer_pattern": dict.fromkeys(names, False),
    }
    return MosLoraConfig(**kept, **{key: _patterns(values) for key, values in frozen.items()})


def _patterns(values: dict[str, object]) -> dict[str, object]:
    return {re.escape(name): value for name, value in values.items()}


def _config_of(layers: dict[str, dict], kept: dict) -> MosLoraConfig:
    """The configuration that gives every layer its settings: the most frequent ones, and patterns for the rest."""
    for setting, pattern in SETTINGS.items():
        values = {name: settings[setting] for name, settings in layers.items()}
        kept[setting] = Counter(values.values()).most_common(1)[0][0]
        kept[pattern] = _patterns({name: value for name, value in values.items() if value != kept[setting]})
    return MosLoraConfig(**kept, target_modules=sorted(layers))


def _scaling(config: MosLoraConfig, settings: dict) -> float:
    rank = settings["r"]
    return settings["lora_alpha"] / (math.sqrt(rank) if config.use_rslora else rank)


def _settings_of(name: str, p: dict, lora_alpha: float | Mapping[str, float] | None, path: Path) -> dict:
    """The settings of one layer of a file without a configuration: what its tensors tell, and the alpha given."""
    alphas = {"": lora_alpha} if isinstance(lora_alpha, int | float) else dict(lora_alpha or {})
    fitting = [prefix for prefix in alphas if name.startswith(prefix)]
    if not fitting:
        raise Refusal(
            "K-ADAPTER",
            "the file does not say which lora_alpha it was trained with",
            file=path,
            key=name,
            fix="pass lora_alpha, one number or prefix → number",
        )
    mixed = "W" in p
    return {
        "r": len(p["A"]),
        "lora_alpha": alphas[max(fitting, key=len)],
        "lora_dropout": 0.0,
        "mixer_init": "kaiming_uniform" if mixed else "identity",
        "train_mixer": mixed,
    }


def _replace_prefix(name: str, rename: Mapping[str, str]) -> str:
    fitting = [prefix for prefix in rename if name.startswith(prefix)]
    if not fitting:
        return name
    prefix = max(fitting, key=len)
    return rename[prefix] + name[len(prefix) :]


def _renamed(adapter: Adapter, new: Callable[[str], str]) -> Adapter:
    """The adapter with every name passed through ``new``, and a configuration that names the layers one by one."""
    config = adapter.config
    dropped = {"peft_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", *SETTINGS,
               *SETTINGS.values()}  # fmt: skip
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in dropped}
    layers = {new(name): layer for name, layer in adapter.layers.items()}
    if len(layers) < len(adapter.layers):
        raise Refusal("K-ADAPTER", "two layers get the same name", found=_few(Counter(map(new, adapter.layers))))
    settings = {new(name): config.settled(name) for name in adapter.layers}
    others = {new(name): tensor for name, tensor in adapter.others.items()}
    return Adapter(_config_of(settings, kept), layers, others)


def _check_complete(config: MosLoraConfig, pieces: dict[str, dict], others: dict, path: Path) -> None:
    """Refuse a mixer too many or too few, a target without a layer, and tensors that nothing in ``config`` explains."""
    missing, unexpected = [], []
    for name, p in pieces.items():
        settings = config.settled(name)
        mixed = stores_mixer(settings["mixer_init"], settings["train_mixer"])
        if mixed != ("W" in p):
            (missing if mixed else unexpected).append(f"{name}.lora_mixer")
    targets = config.target_modules if isinstance(config.target_modules, set) else ()
    missing += [f"{t}.lora_A" for t in sorted(targets) if not any(n == t or n.endswith("." + t) for n in pieces)]
    saved = (*(config.modules_to_save or ()), *EMBEDDING_LAYER_NAMES)  # PEFT adds embeddings when they were resized
    missing += [name for name in config.modules_to_save or () if not any(_within(key, name) for key in others)]
    unexpected += [
        key
        for key in others
        if not any(_within(key, name) for name in saved) and not (config.bias != "none" and key.endswith(".bias"))
    ]
    for names, which in ((missing, "missing"), (unexpected, "unexpected")):
        if names:
            raise Refusal("K-ADAPTER", f"{len(names)} {which} tensors", file=path, found=_few(names))


def _within(key: str, module: str) -> bool:
    return f".{module}." in f".{key}"


def _check_shapes(name: str, layer: LowRank, rank: int, path: Path) -> None:
    found = {k: tuple(t.shape) for k, t in (("A", layer.a), ("W", layer.w), ("B", layer.b)) if t is not None}
    expected = {"A": (rank, *found["A"][1:2]), "W": (rank, rank), "B": (*found["B"][:1], rank)}
    if wrong := [part for part in found if found[part] != expected[part]]:
        part = wrong[0]
        raise Refusal("K-ADAPTER", f"shape of {part}", file=path, key=name, found=found[part], expected=expected[part])


def _few(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
