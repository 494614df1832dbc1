"""The row of the paper's Table 5 that corresponds to a model, from the record of a run or an export.

A row has one LLM, number of bits, method and mixer init. The LLM counts as known only if its folder has
the published name and that model's configuration: weights are not compared, and for other LLMs, even LLaMA-3.1,
there is no row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llava_moslora.config import AdapterSettings, ModelSettings, TowerAdapter
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import PAPER
from llava_moslora.evaluation.results import PAPER_ROWS
from llava_moslora.files.disk import read_json
from llava_moslora.models.llm import read_llm_config
from llava_moslora.models.vision import read_vision_config
from llava_moslora.runs.hyper_parameters import HYPER_PARAMETERS, hyper_parameters
from llava_moslora.runs.record import EXPORT, RUN, read_run

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
VISION_TOWER = "clip-vit-large-patch14-336"
VISION_CONFIG = {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}


@dataclass(frozen=True)
class Backbone:
    """An LLM of Table 5: its published folder name, what its configuration must say, and its setup in Table 8.

    Attributes:
        methods: in Table 5: without mixers, and with.
        table_8: flag → value, of the adapters; what both backbones share is :data:`TRAINING`.
    """

    llm: str
    folder: str
    config: Mapping[str, int]
    rope_theta: float
    bits: int
    methods: tuple[str, str]
    table_8: Mapping[str, float]


_SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_VISION = {"vision_lora_r": 64, "vision_lora_alpha": 16}
# Table 8 for both. Its batch sizes and accumulated ones make 64 on the four GPUs of section 4.2.
TRAINING = {"learning_rate": 2e-5, "global_batch_size": 64, "num_train_epochs": 1}
BACKBONES = (
    Backbone(
        "LLaMA-3", "Meta-Llama-3-8B-Instruct", _SIZES | {"max_position_embeddings": 8192}, 500_000, 16,
        ("LoRA", "MoSLoRA"), {"lora_r": 64, "lora_alpha": 128} | _VISION,
    ),
    Backbone(
        "InternLM2", "internlm2-chat-7b", _SIZES | {"max_position_embeddings": 32768}, 1_000_000, 4,
        ("QLoRA", "QMoSLoRA"), {"lora_r": 512, "lora_alpha": 256} | _VISION,
    ),
)  # fmt: skip


def recognise_row(source: str | Path) -> tuple[str, str]:
    """A key of :data:`~llava_moslora.evaluation.results.PAPER_ROWS`, or "" if none is certain; and a sentence that
    says which row it is and what differs from Table 8, or why there is none.

    Args:
        source: of a run or an export.
    """
    try:
        row, differences = _row(Path(source))
    except _Unknown as unknown:
        return "", f"No matching row of the paper: {unknown}. --paper ROW shows one."
    sentence = f"{row}: the paper's row of this LLM and method, recognised from its record."
    return row, sentence + (f" Different from the paper's Table 8: {', '.join(differences)}." if differences else "")


class _Unknown(Exception):
    """Why no row is certain."""


def _row(source: Path) -> tuple[str, list[str]]:
    base, adapter, training = _recorded(source)
    backbone = next((b for b in BACKBONES if _is_named(base.model_name_or_path, b.folder)), None)
    if backbone is None:
        raise _Unknown(f"{Path(base.model_name_or_path).name} is not an LLM of its Table 5")
    # A run's configurations are its base's, an export holds them itself.
    is_run = (source / RUN).is_file()
    llm = _config(read_llm_config, base.model_name_or_path if is_run else source)
    rope = getattr(llm, "rope_parameters", None) or {}
    if not _agrees(llm, backbone.config) or rope.get("rope_theta") != backbone.rope_theta:
        raise _Unknown(f"the LLM is called {backbone.folder} and its configuration is of another")
    if not _is_named(base.vision_tower or "", VISION_TOWER) or not _agrees(
        _config(read_vision_config, base.tower if is_run else source), VISION_CONFIG
    ):
        raise _Unknown(f"the vision tower is not known as {VISION_TOWER}")
    if base.bits != backbone.bits:
        raise _Unknown(f"{backbone.llm} was trained with {base.bits} bits, in the paper with {backbone.bits}")
    method, start = _method(adapter, backbone)
    row = "-".join(filter(None, (backbone.llm, method, start))).lower()
    assert row in PAPER_ROWS and (backbone.llm, method, start) in PAPER
    return row, _differences(adapter, backbone) + _other_training(training)


def _recorded(source: Path) -> tuple[ModelSettings, AdapterSettings, Mapping[str, Any]]:
    """The base, the adapters and the hyper-parameters of a run or an export; an old export states none of these."""
    try:
        if (source / RUN).is_file():
            record = read_run(source).located
            return record.model, record.adapter, hyper_parameters(record)
        facts = read_json(source / EXPORT)
        base = _settings(ModelSettings, facts.get("base"))
        if not (isinstance(base.model_name_or_path, str) and isinstance(base.vision_tower, str)):
            raise TypeError("a base without the paths of its parts")
        return base, _settings(AdapterSettings, facts.get("adapter")), dict(facts.get("training") or {})
    except (ValueError, TypeError) as error:  # a Refusal is a ValueError
        raise _Unknown("neither a run nor an export that records its base and its adapters") from error


def _settings(kind: type, stored: Any) -> Any:
    """Settings as an export states them; those that this version does not know are left out.

    Raises:
        TypeError: not an object, or without what has no default.
        ValueError: a value that this version does not know.
    """
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in dict(stored).items() if name in known})


def _config(read: Any, source: str | Path) -> PreTrainedConfig:
    try:
        return read(source)
    except Refusal as refusal:
        raise _Unknown(f"a configuration cannot be read ({refusal.what}: {refusal.file})") from refusal


def _is_named(path: str, folder: str) -> bool:
    """Whether the last part of ``path``, or the repository of a Hugging Face cache in it, is called ``folder``."""
    parts = [part.rpartition("--")[2] if part.startswith("models--") else part for part in Path(path).parts]
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts = parts[:-2]
    return parts[-1:] == [folder]


def _agrees(config: PreTrainedConfig, expected: Mapping[str, int]) -> bool:
    return all(getattr(config, name, None) == value for name, value in expected.items())


def _method(adapter: AdapterSettings, backbone: Backbone) -> tuple[str, str]:
    """Method and start as Table 5 names them, from the LLM's adapter; the vision tower's must be of the same kind, or
    plain as in the authors' own configuration file."""
    if adapter.tune_mm_mlp_adapter or adapter.llm is None:
        raise _Unknown("the LLM has no adapter")
    if adapter.method not in ("moslora", "lora"):
        raise _Unknown(f"no row is of --method {adapter.method}")
    starts = {"identity": "", "kaiming_uniform": "kaiming", "orthogonal": "orthogonal"}
    start = starts.get(adapter.llm.mixer_init)
    if start is None or adapter.llm.train_mixer != bool(start):
        trained = "trained" if adapter.llm.train_mixer else "fixed"
        raise _Unknown(f"no row has {trained} mixers with init {adapter.llm.mixer_init}")
    if adapter.vision is not None and not _is_plain(adapter.vision) and _mixers(adapter.vision) != _mixers(adapter.llm):
        raise _Unknown("no row has other mixers in the vision tower than in the LLM")
    return backbone.methods[bool(start)], start


def _mixers(adapter: TowerAdapter) -> tuple[str, bool]:
    return adapter.mixer_init, adapter.train_mixer


def _is_plain(adapter: TowerAdapter) -> bool:
    return _mixers(adapter) == ("identity", False)


def _differences(adapter: AdapterSettings, backbone: Backbone) -> list[str]:
    """What differs from Table 8, as ``flag value (the paper's)``."""
    found = [
        f"--{name} {getattr(adapter, name):g} ({value:g})"
        for name, value in backbone.table_8.items()
        if getattr(adapter, name) != value
    ]
    if (targets := set(adapter.lora_target_modules)) and targets != LINEARS:
        found.append(f"--lora_target_modules {' '.join(adapter.lora_target_modules)} (every linear)")
    if adapter.vision_lora_target_modules:
        found.append(f"--vision_lora_target_modules {' '.join(adapter.vision_lora_target_modules)} (every linear)")
    if adapter.llm is not None and adapter.vision is not None and _is_plain(adapter.vision) != _is_plain(adapter.llm):
        found.append("plain LoRA in the vision tower")
    return found


def _other_training(training: Mapping[str, Any]) -> list[str]:
    """As :func:`_differences`, of what ``training`` states; what it does not state is not compared."""
    stated = {name: value for name in HYPER_PARAMETERS if isinstance(value := training.get(name), int | float)}
    found = [
        f"--{name} {stated[name]:g} ({value:g})" for name, value in TRAINING.items() if stated.get(name, value) != value
    ]
    if stated.get("max_steps", 0) > 0:  # which the Trainer follows in place of epochs
        found.append(f"--max_steps {stated['max_steps']} (none)")
    # Learning rates of parts, which the table does not have: flag → where it has no effect.
    parts = dict.fromkeys(("vision_lr", "mm_projector_lr", "mixer_lr"), stated.get("learning_rate"))
    parts["lora_plus_ratio"] = 1
    return found + [
        f"--{name} {stated[name]:g} (none)" for name, idle in parts.items() if stated.get(name, idle) != idle
    ]
