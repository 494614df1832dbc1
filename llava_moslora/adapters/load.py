"""Reads adapters of this package and of other tools, without a model and without executing anything from the file::

    read_adapter("adapter")                                               # ours, the authors', plain LoRA
    read_adapter("iter_1.pth", lora_alpha={"llm.": 128, "visual_encoder.": 16}, rename={"llm.": ""})  # XTuner's

Missing or unexpected tensors and unknown settings are refused: an adapter without its mixer runs, but is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils.other import EMBEDDING_LAYER_NAMES, get_pattern_key

from llava_moslora.adapters import diffusers_file
from llava_moslora.adapters.config import PEFT_TYPE, MosLoraConfig, config_of_layers, exact_patterns, stores_mixer
from llava_moslora.adapters.fold import PEFT_PREFIX, Adapter, LowRank, rename_adapter, replace_prefix
from llava_moslora.adapters.kinds import DORA, KINDS, Kind
from llava_moslora.errors import Refusal, few
from llava_moslora.files.disk import read_json
from llava_moslora.files.tensors import LazyTensor, read_tensor_file

CONFIG, WEIGHT_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
FORK_INITS = {True: "kaiming_uniform", "kai": "kaiming_uniform", "orth": "orthogonal"}

Layers = dict[str, dict[str, LazyTensor]]  # adapted linear → its tensors by short name (Method.names)


def _moslora_needed(config: MosLoraConfig, module: str, present: set[str]) -> set[str]:
    settings = config.settings_of(module)
    stores = config.start != "folded" and stores_mixer(settings["mixer_init"], settings["train_mixer"])
    mixer = {"W"} if stores else set()
    return {"A", "B"} | mixer | ({"A0", "B0"} if config.start == "pissa" else set())


def _moslora(tensors: dict[str, LazyTensor], config: MosLoraConfig, module: str) -> LowRank:
    settings = config.settings_of(module)
    rank = settings["r"]
    a, b = tensors["A"].shape, tensors["B"].shape
    expected = {"A": (rank, *a[1:2]), "W": (rank, rank), "B": (*b[:1], rank)}
    expected |= {"A0": expected["A"], "B0": expected["B"]}
    for part, tensor in tensors.items():
        if tensor.shape != expected[part]:
            what, found = f"shape of {part}", tensor.shape
            raise Refusal("K-ADAPTER", what, file=tensor.file, key=module, found=found, expected=expected[part])
    scaling = settings["lora_alpha"] / (math.sqrt(rank) if config.use_rslora else rank)
    start = (tensors["A0"], tensors["B0"]) if "A0" in tensors else None
    return LowRank(tensors["A"], tensors.get("W"), tensors["B"], scaling, start)


def _plain_lora(tensors: dict[str, LazyTensor], config: MosLoraConfig, module: str) -> LowRank:
    """With an identity mixer, so that training can continue from it; ΔW is the same."""
    rank = config.settings_of(module)["r"]
    identity = tensors["A"].then(lambda a: torch.eye(rank, dtype=a.dtype), shape=(rank, rank))
    return _moslora(tensors | {"W": identity}, config, module)


LORA_NAMES = {"lora_A.weight": "A", "lora_B.weight": "B", **diffusers_file.NAMES}
# lora_AB: the mixer in the MoSLoRA authors' repository; their PEFT fork and this package call it lora_mixer
MIXED_NAMES = LORA_NAMES | {"lora_mixer.weight": "W", "lora_AB.weight": "W"} | diffusers_file.MIXER_NAMES
MIXED_NAMES |= {"lora_start_A.weight": "A0", "lora_start_B.weight": "B0"}
ALL_KINDS: dict[str, Kind] = {  # by peft_type of adapter_config.json
    "LORA": Kind(MosLoraConfig, LORA_NAMES, lambda config, module, present: {"A", "B"}, _plain_lora),
    PEFT_TYPE: Kind(MosLoraConfig, MIXED_NAMES, _moslora_needed, _moslora),
    **KINDS,
}


def read_adapter(
    path: str | Path, *, rename: Mapping[str, str] | None = None, lora_alpha: float | Mapping[str, float] | None = None
) -> Adapter:
    """Read an adapter of this package, the MoSLoRA authors' repository, their PEFT fork, XTuner, diffusers, or a plain
    LoRA.

    Names, shapes and settings are checked; tensors are read lazily. A plain LoRA folder gets a trainable identity
    mixer, so that training can continue from it; it computes the same.

    Args:
        path: an adapter folder, or one weight file without a configuration (XTuner's ``iter_N.pth``, diffusers'
            ``pytorch_lora_weights.safetensors``).
        rename: prefix of the names in the file → prefix in the model, such as ``{"llm.": "model.language_model."}``;
            the longest matching prefix applies.
        lora_alpha: for a file without a configuration, the alpha it was trained with, or prefix in the file → alpha;
            not needed for a diffusers file (:mod:`llava_moslora.adapters.diffusers_file`).

    Raises:
        Refusal: K-ADAPTER for anything missing, unexpected, of the wrong shape or of unknown meaning.
    """
    path = Path(path)
    layers, others = _by_module(_read_tensors(path), path)
    if path.is_dir():
        kind, config = _stored_config(path, layers)
        _check_others(config, others, path)
    elif lora_alpha is None and diffusers_file.is_diffusers_file(layers):
        alphas = diffusers_file.read_alphas(path, layers, others)
        kind, config = ALL_KINDS[PEFT_TYPE], _config_from_tensors(layers, alphas, path)
        _check_others(config, others, path)
    else:  # XTuner saves the whole training state in one file: the caller decides about its other tensors
        kind, config = ALL_KINDS[PEFT_TYPE], _config_from_tensors(layers, lora_alpha, path)
    _check_layers(kind, config, layers, path)
    updates = {name: kind.update(tensors, config, name) for name, tensors in layers.items()}
    adapter = Adapter(config, updates, others)
    return adapter if rename is None else rename_adapter(adapter, lambda name: replace_prefix(name, rename))


def _read_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a folder's weight file, or of the file ``path``."""
    file = path
    if path.is_dir():
        file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), path / WEIGHT_FILES[0])
    if not file.is_file():
        raise Refusal("K-ADAPTER", "no adapter weights here", file=path, expected=WEIGHT_FILES[0])
    try:
        return read_tensor_file(file, only_tensors=True)
    except Refusal as refusal:
        what, found = "the weights cannot be read", refusal.found
        raise Refusal("K-ADAPTER", what, file=file, found=found, fix=refusal.fix) from refusal


def _by_module(tensors: dict[str, LazyTensor], path: Path) -> tuple[Layers, dict[str, LazyTensor]]:
    """The adapted linears, and the other tensors by their name without PEFT's prefix.

    Saved names end in ``lora_A.weight``; names of a live model (XTuner's .pth) have the adapter's name in them:
    ``lora_A.default.weight``.
    """
    layers: Layers = {}
    others, adapters, unknown = {}, set(), []
    patterns = _name_patterns()
    for name, tensor in tensors.items():
        bare = name.replace(PEFT_PREFIX, "", 1)
        match, part = next(((m, part) for pattern, part in patterns if (m := pattern.fullmatch(bare))), (None, ""))
        if match:
            layers.setdefault(match["module"], {})[part] = tensor
            adapters.add(match["adapter"])
        elif ".lora_" in bare or ".lora." in bare:
            unknown.append(name)
        else:
            others[bare] = tensor
    if unknown:
        raise Refusal(
            "K-ADAPTER", f"{len(unknown)} unexpected tensors", file=path, found=few(unknown),
            expected="lora_A, lora_B and a mixer (lora_mixer or lora_AB)",
        )  # fmt: skip
    if len(adapters) > 1:
        raise Refusal("K-ADAPTER", "several adapters in one file", file=path, found=few(sorted(map(str, adapters))))
    if not layers:
        raise Refusal("K-ADAPTER", "no LoRA tensors in it", file=path, found=few(tensors), expected="names with lora_A")
    return layers, others


def _name_patterns() -> list[tuple[re.Pattern[str], str]]:
    """A pattern for each stored name of every kind, and the short name."""
    names = {name: part for kind in ALL_KINDS.values() for name, part in kind.names.items()}
    patterns = []
    for name, part in names.items():
        stem, dot, ending = name.partition(".")
        pattern = rf"(?P<module>.+)\.{re.escape(stem)}(?:\.(?P<adapter>[^.]+))?{re.escape(dot + ending)}"
        patterns.append((re.compile(pattern), part))
    return patterns


def _stored_config(folder: Path, layers: Layers) -> tuple[Kind, PeftConfig]:
    """The kind and the configuration of an adapter folder."""
    if not (folder / CONFIG).is_file():
        raise Refusal("K-ADAPTER", "no adapter here", file=folder, expected=CONFIG)
    stored = read_json(folder / CONFIG, "K-ADAPTER")
    saved = stored.get("modules_to_save") or []
    if not (isinstance(saved, list) and all(isinstance(module, str) for module in saved)):
        expected = "a list of names of modules"
        raise Refusal(
            "K-ADAPTER", "not a list", file=folder / CONFIG, key="modules_to_save", found=saved, expected=expected
        )
    name = stored.pop("peft_type", None)
    if name == "LORA" and stored.get("use_dora"):
        name = DORA
    if not isinstance(name, str) or name not in ALL_KINDS:
        known = " or ".join(sorted(ALL_KINDS.keys() - {DORA}))
        raise Refusal("K-ADAPTER", "not a LoRA", file=folder, key="peft_type", found=name, expected=known)
    kind = ALL_KINDS[name]
    if name == "LORA":
        kind, stored = _translate_lora(stored, layers, folder)
    known_fields = {f.name for f in dataclasses.fields(kind.config)}
    # Other versions of PEFT have other fields. An empty one changes nothing; one that is set might.
    if foreign := [key for key in stored if key not in known_fields and stored[key] and key != "runtime_config"]:
        raise Refusal("K-ADAPTER", "unknown settings", file=folder, key=few(foreign), fix="upgrade peft")
    try:
        return kind, kind.config(**{key: value for key, value in stored.items() if key in known_fields})
    except Refusal:
        raise
    except (TypeError, ValueError) as error:  # PEFT's own checks
        raise Refusal("K-ADAPTER", f"a setting that PEFT refuses: {error}", file=folder) from error


def _translate_lora(stored: dict, layers: Layers, folder: Path) -> tuple[Kind, dict]:
    """The kind of a configuration of type LORA, and its fields in this package's terms. The authors' repository and
    their PEFT fork keep the type LORA and have fields of their own for the mixer."""
    reference, pattern = stored.pop("lora_use_mixer", False), stored.pop("lora_use_mixer_pattern", None) or {}
    fork = stored.pop("use_moslora", False)
    if reference or pattern or fork:
        if fork not in (False, *FORK_INITS):
            key, expected = "use_moslora", list(FORK_INITS)
            raise Refusal("K-ADAPTER", "unknown mixer", file=folder, key=key, found=fork, expected=expected)
        mixed = {name: pattern.get(get_pattern_key(pattern.keys(), name), reference or fork) for name in layers}
        plain = [name for name in layers if not mixed[name]]
        return ALL_KINDS[PEFT_TYPE], stored | {
            "mixer_init": FORK_INITS.get(fork, "kaiming_uniform"),
            # a frozen identity: no mixer
            "mixer_init_pattern": exact_patterns(dict.fromkeys(plain, "identity")),
            "train_mixer_pattern": exact_patterns(dict.fromkeys(plain, False)),
        }
    if mixers := [name for name, tensors in layers.items() if "W" in tensors]:
        raise Refusal(
            "K-ADAPTER", f"{len(mixers)} mixers, but the configuration is a plain LoRA's: B·A would be wrong",
            file=folder, found=few(mixers),
            fix=f'restore the configuration, or set "lora_use_mixer": true in {folder / CONFIG}',
        )  # fmt: skip
    return ALL_KINDS["LORA"], stored | {"mixer_init": "identity"}


def _config_from_tensors(layers: Layers, lora_alpha: float | Mapping[str, float] | None, path: Path) -> MosLoraConfig:
    """The configuration of a file without one: ranks and mixers from the tensors, and the given alpha."""
    alphas = {"": lora_alpha} if isinstance(lora_alpha, int | float) else dict(lora_alpha or {})
    settings = {}
    for name, tensors in layers.items():
        prefixes = [prefix for prefix in alphas if name.startswith(prefix)]
        if not prefixes:
            raise Refusal(
                "K-ADAPTER", "the file does not contain the lora_alpha it was trained with", file=path, key=name,
                fix="give lora_alpha: one number, or one for each prefix of names",
            )  # fmt: skip
        if "A" not in tensors:
            raise Refusal("K-ADAPTER", "1 missing tensors", file=path, expected=f"{name}.lora_A")
        settings[name] = {
            "r": next(iter(tensors["A"].shape), 0),
            "lora_alpha": alphas[max(prefixes, key=len)],
            "lora_dropout": 0.0,
            "mixer_init": "kaiming_uniform" if "W" in tensors else "identity",
            "train_mixer": "W" in tensors,
        }
    return config_of_layers(settings, {})


def _check_layers(kind: Kind, config: PeftConfig, layers: Layers, path: Path) -> None:
    """Refuse layers with missing or unexpected tensors, and targets without a layer."""
    stored_names: dict[str, str] = {}
    for name, part in kind.names.items():
        stored_names.setdefault(part, name.partition(".")[0])
    missing, unexpected = [], []
    for module, tensors in layers.items():
        needed = kind.needed(config, module, set(tensors))
        missing += [f"{module}.{stored_names[part]}" for part in sorted(needed - tensors.keys())]
        unexpected += [f"{module}.{stored_names.get(part, part)}" for part in sorted(tensors.keys() - needed)]
    all_adapted = isinstance(config.target_modules, set) and not config.exclude_modules
    targets = config.target_modules if all_adapted else ()
    bare = [t for t in sorted(targets) if not any(name == t or name.endswith("." + t) for name in layers)]
    missing += [f"{target}.{next(iter(stored_names.values()))}" for target in bare]
    _refuse(missing, unexpected, path)


def _check_others(config: PeftConfig, others: dict[str, LazyTensor], path: Path) -> None:
    """Refuse tensors outside the layers that nothing in ``config`` explains, and modules to save without any."""
    saved = config.modules_to_save or ()
    has_biases = getattr(config, "bias", "none") != "none"  # LoRA's setting; other methods train none
    unexpected = [
        key
        for key in others  # PEFT adds the embeddings where they were resized
        if not any(_within(key, name) for name in (*saved, *EMBEDDING_LAYER_NAMES))
        and not (has_biases and key.endswith(".bias"))
    ]
    _refuse([name for name in saved if not any(_within(key, name) for key in others)], unexpected, path)


def _refuse(missing: list[str], unexpected: list[str], path: Path) -> None:
    if missing:
        raise Refusal("K-ADAPTER", f"{len(missing)} missing tensors", file=path, expected=few(missing))
    if unexpected:
        raise Refusal("K-ADAPTER", f"{len(unexpected)} unexpected tensors", file=path, found=few(unexpected))


def _within(key: str, module: str) -> bool:
    return f".{module}." in f".{key}"
