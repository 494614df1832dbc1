"""Converts InternLM2's configuration and tensors to Llama's, which computes the same function.

InternLM2 stores query, key and value as one matrix ``wqkv`` whose rows are grouped
by key/value head: for each of the K heads, first the G query heads that share it, then the key, then the value::

    wqkv [K·(G+2)·d, D]  →  q_proj [K·G·d, D], k_proj [K·d, D], v_proj [K·d, D]

Everything else is renamed. No code from the model's folder runs (``auto_map`` in its configuration is ignored), and
a model trained on it can be exported as a Llama.

Shapes: D width, d width of a head, K key/value heads, G query heads per key/value head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaConfig

from llava_moslora.errors import Refusal
from llava_moslora.files.tensors import LazyTensor
from llava_moslora.models.config_file import make_config

MODEL_TYPE = "internlm2"
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COUNTS = ("num_key_value_heads", "max_position_embeddings")  # may be missing
# Fields that mean the same in both configurations.
SAME = (
    *NEEDED,
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
)
NAMES = {"model.tok_embeddings": "model.embed_tokens", "output": "lm_head", "model.norm": "model.norm"}
LAYER_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def llama_config(raw: Mapping[str, Any], file: Path) -> LlamaConfig:
    """The Llama configuration of the InternLM2 configuration ``raw``, read from ``file``.

    Raises:
        Refusal: K-CONFIG, a field is missing or has a value that Llama does not have.
    """
    given = [field for field in COUNTS if raw.get(field) is not None]
    if missing := [field for field in (*NEEDED, *given) if type(raw.get(field)) is not int]:
        found = raw.get(missing[0])
        raise Refusal("K-CONFIG", "not a number", file=file, key=missing[0], found=found, fix="download it again")
    heads = raw["num_attention_heads"]
    groups = raw.get("num_key_value_heads") or heads
    if raw["hidden_size"] % heads or heads % groups:
        what, found = "heads that do not divide", f"{raw['hidden_size']} / {heads} / {groups}"
        raise Refusal("K-CONFIG", what, file=file, key="num_key_value_heads", found=found, fix="download it again")
    scaling = dict(raw.get("rope_scaling") or {"type": "default"})
    old, new = scaling.pop("type", None), scaling.pop("rope_type", None)
    kind = new or old
    if kind not in ("default", "dynamic", "linear"):
        raise Refusal(
            "K-CONFIG", "unknown scaling", file=file, key="rope_scaling", found=kind,
            expected="dynamic, linear or none", fix="restore the published configuration",
        )  # fmt: skip
    own = {
        "num_key_value_heads": groups,
        "attention_bias": raw.get("bias", True),  # of wqkv and wo; InternLM2's own default. Its MLP has none
        "rope_parameters": {"rope_type": kind, "rope_theta": raw.get("rope_theta", 10000), **scaling},
        "architectures": ["LlamaForCausalLM"],
        "dtype": raw.get("torch_dtype") or raw.get("dtype"),
    }
    return make_config(LlamaConfig, {field: raw[field] for field in SAME if field in raw} | own, file)


def llama_tensors(found: Mapping[str, LazyTensor], config: LlamaConfig) -> dict[str, LazyTensor]:
    """The tensors of an InternLM2 checkpoint under Llama's names, ``wqkv`` split when read.

    Works on a complete checkpoint and on one shard of it. A name that InternLM2 does not have is kept.

    Raises:
        Refusal: K-SHAPE, a ``wqkv`` that does not have the configuration's heads.
    """
    result: dict[str, LazyTensor] = {}
    for name, stored in found.items():
        layer = re.fullmatch(r"(model\.layers\.\d+\.)(.+)\.(\w+)", name)
        if layer and layer[2] == "attention.wqkv":
            parts = _split(name, stored, config)
            result |= {f"{layer[1]}self_attn.{part}_proj.{layer[3]}": tensor for part, tensor in parts.items()}
        elif layer:
            result[f"{layer[1]}{LAYER_NAMES.get(layer[2], layer[2])}.{layer[3]}"] = stored
        else:
            module, _, parameter = name.rpartition(".")
            result[f"{NAMES.get(module, module)}.{parameter}"] = stored
    return result


def _split(name: str, stored: LazyTensor, config: LlamaConfig) -> dict[str, LazyTensor]:
    """Query, key and value of a fused weight [K·(G+2)·d, D] or bias [K·(G+2)·d]."""
    groups, width = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // groups
    rows = groups * (queries + 2) * width
    if stored.shape[0] != rows:
        expected = f"{rows} rows: {groups} groups of {queries} queries, key and value, {width} wide"
        found, fix = list(stored.shape), "config.json and weights must come from the same download"
        raise Refusal("K-SHAPE", "wrong shape", file=stored.file, key=name, found=found, expected=expected, fix=fix)

    def part(begin: int, end: int) -> LazyTensor:
        def take(fused: Tensor) -> Tensor:
            heads = fused.unflatten(0, (groups, queries + 2, width))  # (K, G+2, d[, D])
            # A copy of its own: a view would keep the fused tensor, and share storage when saved.
            return heads[:, begin:end].clone().flatten(0, 2)

        return stored.then(take, shape=(groups * (end - begin) * width, *stored.shape[1:]))

    return {"q": part(0, queries), "k": part(queries, queries + 1), "v": part(queries + 1, queries + 2)}
