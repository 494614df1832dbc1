"""InternLM2 in plain torch, written from its description and independent of the package, and its published layout.

Shapes: B batch, T tokens, D width, d width of a head, H query heads, K key/value heads.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

# As internlm2-chat-7b's config.json has them, but for the sizes.
CONFIG = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {
        "AutoConfig": "configuration_internlm2.InternLM2Config",
        "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
    },
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "model_type": "internlm2",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 128,
}


def make_tensors(config: dict) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = width // config["num_attention_heads"]
    fused = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * head
    tensors = {"model.tok_embeddings.weight": draw(vocabulary, width), "model.norm.weight": 1 + draw(width)}
    for n in range(config["num_hidden_layers"]):
        layer = {
            "attention.wqkv.weight": draw(fused, width),
            "attention.wo.weight": draw(width, width),
            "feed_forward.w1.weight": draw(inner, width),
            "feed_forward.w3.weight": draw(inner, width),
            "feed_forward.w2.weight": draw(width, inner),
            "attention_norm.weight": 1 + draw(width),
            "ffn_norm.weight": 1 + draw(width),
        }
        if config["bias"]:
            layer |= {"attention.wqkv.bias": draw(fused), "attention.wo.bias": draw(width)}
        tensors |= {f"model.layers.{n}.{name}": tensor for name, tensor in layer.items()}
    if not config["tie_word_embeddings"]:
        tensors["output.weight"] = draw(vocabulary, width)
    return tensors


def write_internlm2(folder: Path, shards: int = 1, kind: str = ".safetensors", **changes) -> tuple[Path, dict, dict]:
    """A random checkpoint in the published layout: the folder, its configuration and its tensors."""
    folder.mkdir(parents=True)
    config = CONFIG | changes
    tensors = make_tensors(config)
    (folder / "config.json").write_text(json.dumps(config))
    save = save_file if kind == ".safetensors" else torch.save
    stem = "model" if kind == ".safetensors" else "pytorch_model"
    if shards == 1:
        save(tensors, folder / f"{stem}{kind}")
        return folder, config, tensors
    weight_map = {}
    for n in range(shards):
        file = f"{stem}-{n + 1:05d}-of-{shards:05d}{kind}"
        part = {name: tensors[name] for name in list(tensors)[n::shards]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, config, tensors


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, config: dict, head: int) -> Tensor:
    """Rotary positions on [B, T, H, d]; beyond the trained length the base grows with it (dynamic NTK)."""
    length, limit, base = x.shape[1], config["max_position_embeddings"], config["rope_theta"]
    scaling = config["rope_scaling"]
    positions = torch.arange(length).double()
    if scaling and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    elif scaling and length > limit:
        factor = scaling["factor"]
        base = base * (factor * length / limit - (factor - 1)) ** (head / (head - 2))
    angles = torch.outer(positions, base ** (-torch.arange(0, head, 2).double() / head))  # (T, d/2)
    cos, sin = (f(torch.cat([angles, angles], -1))[None, :, None] for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def logits(ids: Tensor, tensors: dict[str, Tensor], config: dict) -> Tensor:
    """float64[B, T, V] for int64[B, T]."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head, queries, eps = config["hidden_size"] // heads, heads // groups, config["rms_norm_eps"]
    batch, length = ids.shape
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
    x = tensors["model.tok_embeddings.weight"][ids]
    for n in range(config["num_hidden_layers"]):
        w = {k.removeprefix(f"model.layers.{n}."): t for k, t in tensors.items() if k.startswith(f"model.layers.{n}.")}
        normed = rms_norm(x, w["attention_norm.weight"], eps)
        fused = F.linear(normed, w["attention.wqkv.weight"], w.get("attention.wqkv.bias"))
        fused = fused.view(batch, length, groups, queries + 2, head)
        mixed = torch.zeros(batch, length, heads, head, dtype=x.dtype)
        rotated_keys = rotate(fused[..., queries, :], config, head)  # (B, T, K, d)
        for h in range(heads):  # head by head, so that nothing about grouping is taken from a library
            group, member = divmod(h, queries)
            query = rotate(fused[:, :, group, member][:, :, None], config, head)[:, :, 0]  # (B, T, d)
            scores = query @ rotated_keys[:, :, group].transpose(1, 2) / head**0.5 + mask
            mixed[:, :, h] = scores.softmax(-1) @ fused[:, :, group, queries + 1]
        x = x + F.linear(mixed.flatten(2), w["attention.wo.weight"], w.get("attention.wo.bias"))
        normed = rms_norm(x, w["ffn_norm.weight"], eps)
        gate = F.silu(normed @ w["feed_forward.w1.weight"].T)
        x = x + (gate * (normed @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    x = rms_norm(x, tensors["model.norm.weight"], eps)
    return x @ tensors.get("output.weight", tensors["model.tok_embeddings.weight"]).T
