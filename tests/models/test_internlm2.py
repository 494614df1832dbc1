"""InternLM2 as Llama: the same function, from every file layout, without its code."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from llava_moslora.errors import Refusal
from llava_moslora.models.internlm2 import llama_config
from llava_moslora.models.llm import load_llm, read_llm_config
from support.internlm2_reference import CONFIG, logits, write_internlm2


def ids(length: int = 20) -> torch.Tensor:
    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def difference(folder, config, tensors, length: int = 20) -> float:
    model = load_llm(folder, torch.float64)  # so that only a difference of the maths is seen, not of rounding
    assert type(model) is LlamaForCausalLM
    expected = logits(ids(length), {name: t.double() for name, t in tensors.items()}, config)
    assert expected.std() > 0.5  # a dead model would agree with anything
    return (model(ids(length)).logits - expected).abs().max().item()


@pytest.mark.parametrize("groups", [8, 2, 1], ids=lambda k: f"{8 // k} queries per group")
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_internlm2s(tmp_path, groups, bias):
    assert difference(*write_internlm2(tmp_path / "m", num_key_value_heads=groups, bias=bias)) <= 1e-5


def test_the_grouping_matters(tmp_path):
    folder, config, tensors = write_internlm2(tmp_path / "m", num_key_value_heads=2)
    assert difference(folder, config | {"num_key_value_heads": 2, "num_attention_heads": 8}, tensors) <= 1e-5
    raw = json.loads((folder / "config.json").read_text())
    # The same rows cut as if all queries came first.
    name = "model.layers.0.attention.wqkv.weight"
    rows = tensors[name].unflatten(0, (2, 6, 8))
    wrong = torch.cat([rows[:, :4].flatten(0, 2), rows[:, 4].flatten(0, 1), rows[:, 5].flatten(0, 1)])
    assert raw["num_key_value_heads"] == 2 and difference(folder, config, tensors | {name: wrong}) > 1e-2


@pytest.mark.parametrize("scaling", [{"type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 4.0}, None])
def test_positions_beyond_the_trained_length(tmp_path, scaling):
    assert difference(*write_internlm2(tmp_path / "m", rope_scaling=scaling, rope_theta=5000), length=70) <= 1e-5


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_file_layout(tmp_path, kind, shards):
    assert difference(*write_internlm2(tmp_path / "m", shards, kind)) <= 1e-5


def test_tied_head(tmp_path):
    folder, config, tensors = write_internlm2(tmp_path / "m", tie_word_embeddings=True)
    assert difference(folder, config, tensors) <= 1e-5
    model = load_llm(folder, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dtype_and_nf4(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder, _, _ = write_internlm2(tmp_path / "m")
    assert {p.dtype for p in load_llm(folder, torch.bfloat16).parameters()} == {torch.bfloat16}
    model = load_llm(folder, torch.bfloat16, bits=4)
    linears = {n: type(m).__name__ for n, m in model.named_modules() if "Linear" in type(m).__name__}
    assert {n for n, kind in linears.items() if kind != "Linear4bit"} == {"lm_head"} and len(linears) == 15
    assert torch.isfinite(model.train()(ids()).logits).all()


def test_configuration_fields(tmp_path):
    config = llama_config(CONFIG, tmp_path / "config.json")
    same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    same += ["num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range"]
    same += ["bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"]
    assert {field: getattr(config, field) for field in same} == {field: CONFIG[field] for field in same}
    assert config.rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000.0}
    assert (config.model_type, config.architectures, config.attention_bias, config.mlp_bias) == (
        "llama", ["LlamaForCausalLM"], False, False,
    )  # fmt: skip
    assert config.dtype == torch.float32 and config.head_dim == 8 and not hasattr(config, "auto_map")
    assert llama_config(CONFIG | {"rope_scaling": None}, tmp_path).rope_parameters["rope_type"] == "default"
    without = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "bias")}
    assert llama_config(without, tmp_path).num_key_value_heads == 8
    assert llama_config(without, tmp_path).attention_bias


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"intermediate_size": True}, "intermediate_size"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": -2}, "num_key_value_heads"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"rope_scaling": 2.0}, "rope_scaling"),
        ({"architectures": [None]}, "architectures"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_configurations_that_are_refused(tmp_path, changes, key):
    folder, _, _ = write_internlm2(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(Refusal) as caught:
        read_llm_config(folder)
    assert (caught.value.code, caught.value.key, caught.value.file) == ("K-CONFIG", key, folder / "config.json")


def test_other_heads_than_the_weights_have(tmp_path):
    folder, _, _ = write_internlm2(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_key_value_heads": 4}))
    with pytest.raises(Refusal, match=r"attention\.wqkv\.weight: wrong shape; found \[96, 64\]; expected 128 rows"):
        load_llm(folder, torch.float32)


def test_unknown_tensor_is_named(tmp_path):
    folder, _, tensors = write_internlm2(tmp_path / "m", kind=".bin")
    torch.save(tensors | {"model.layers.0.attention.gate.weight": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(Refusal, match=r"pytorch_model\.bin:model\.layers\.0\.attention\.gate\.weight"):
        load_llm(folder, torch.float32)
