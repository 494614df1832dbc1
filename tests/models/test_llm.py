"""LLM folders: native architectures as transformers loads them, and what they cost in memory."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    LlavaConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llava_moslora.config import ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import check_parts
from llava_moslora.models.llava import text_llm
from llava_moslora.models.llm import (
    check_llm_composes,
    load_llm,
    longest_text,
    read_llm_config,
    read_llm_tensors,
    with_old_rope,
)
from llava_moslora.text.tokenizer import load_tokenizer
from support.tiny import write_gemma2, write_llm

ROOT = Path(__file__).parents[2]
SMALL = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config_class", "model_class"),
    [
        (MistralConfig, MistralForCausalLM),
        (Qwen2Config, Qwen2ForCausalLM),
        (Qwen3Config, Qwen3ForCausalLM),
        (Olmo2Config, Olmo2ForCausalLM),  # named nowhere in the package: what transformers has needs no row
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_native_architectures(tmp_path, config_class, model_class, tied):
    torch.manual_seed(0)
    stock = model_class(config_class(**SMALL, tie_word_embeddings=tied)).eval()
    stock.generation_config.eos_token_id = [7, 9]
    stock.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    model = load_llm(tmp_path / "m", torch.float32)
    assert type(model) is model_class and model.generation_config.eos_token_id == [7, 9]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, stock(ids).logits)


PLAIN = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "starcoder2", "smollm3", "exaone4", "stablelm")
ACCEPTED = {
    **{kind: {} for kind in PLAIN},
    **{kind: {"head_dim": 8} for kind in ("gemma", "gemma3_text", "helium", "glm", "glm4")},
    "granite": {"logits_scaling": 1.0, "embedding_multiplier": 12.0},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": None},
    "cohere": {"logit_scale": 1.0},
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_the_loss_of_an_accepted_llm_is_its_own(tmp_path, kind):
    tokens = {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
    CONFIG_MAPPING[kind](**SMALL, **ACCEPTED[kind], **tokens).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = read_llm_config(tmp_path)
    check_llm_composes(config, tmp_path)
    llm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        llm.lm_head.weight.mul_(300)  # logits so large that a cap or a factor would show
        ids = torch.randint(3, 100, (2, 12))
        stock = llm(input_ids=ids, labels=ids).loss
        ours = text_llm(llm)(input_ids=ids, labels=ids).loss
    assert stock > 2 and torch.allclose(ours, stock, rtol=1e-6, atol=0)


REFUSED = {
    "gemma2": ({"head_dim": 8}, "final_logit_softcapping = 30.0"),
    "gemma2, small cap": ({"head_dim": 8, "final_logit_softcapping": 5.0}, "final_logit_softcapping = 5.0"),
    "cohere": ({}, "logit_scale = 0.0625"),
    "cohere2": ({"head_dim": 8}, "logit_scale = 0.0625"),
    "granite": ({"logits_scaling": 8.0}, "logits_scaling = 8.0"),
    "nanochat": ({}, "scales or caps"),
    "vaultgemma": ({"head_dim": 8}, "scales or caps"),
    "minicpm3": ({}, "dim_model_base = 256"),
    "recurrent_gemma": ({}, "scales or caps"),
    "falcon_h1": ({"lm_head_multiplier": 0.5}, "lm_head_multiplier = 0.5"),
    "gemma3n_text": ({"num_hidden_layers": 15, "num_kv_shared_layers": 0}, "second table, model.embed_tokens_"),
    "bert": ({}, "not a language model that"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_llm_that_does_more_than_its_head_is_refused(tmp_path, name):
    """Of every way that architectures have, none is known to the check by its name."""
    changes, why = REFUSED[name]
    CONFIG_MAPPING[name.split(",")[0]](**(SMALL | changes)).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=rf"C-MODEL\] .*config.json:model_type.*{re.escape(why)}") as refusal:
        check_llm_composes(read_llm_config(tmp_path), tmp_path)
    assert refusal.value.fix


def test_the_llm_of_a_llava_is_checked_too(tmp_path):
    LlavaConfig(text_config=Gemma2Config(**SMALL, head_dim=8)).save_pretrained(tmp_path)
    save_file({"language_model.lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match=r"C-MODEL.*final_logit_softcapping"):
        check_llm_composes(read_llm_config(tmp_path), tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_check_draws_no_random_numbers(tmp_path, kind):
    """Or a new projector would start from other numbers than the same --seed gave before."""
    CONFIG_MAPPING[kind](**SMALL, head_dim=8).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    config = read_llm_config(tmp_path)
    with pytest.raises(Refusal) if kind == "gemma2" else nullcontext():
        check_llm_composes(config, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_positions_are_no_second_table_of_tokens(tmp_path):
    """More rows than half of a small vocabulary has: OPT has 2050."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    OPTConfig(vocab_size=3000, word_embed_proj_dim=32, **sizes).save_pretrained(tmp_path)
    check_llm_composes(read_llm_config(tmp_path), tmp_path)


def test_the_parts_of_a_training_are_checked(tmp_path):
    folder = write_gemma2(tmp_path)
    with pytest.raises(Refusal, match=r"C-MODEL.*final_logit_softcapping"):
        check_parts(ModelSettings(str(folder)), load_tokenizer(folder))


@pytest.mark.parametrize("stored", ["generation_config.json", "config.json"])
def test_nothing_but_token_ids_is_kept_of_the_generation_settings(tmp_path, stored):
    folder = write_llm(tmp_path / "m", eos_token_id=7, bos_token_id=5)
    settings = {"repetition_penalty": 1.3, "num_beams": 4, "no_repeat_ngram_size": 2}
    settings |= {"do_sample": True, "temperature": 0.6} if stored != "config.json" else {}
    raw = json.loads((folder / stored).read_text())
    (folder / stored).write_text(json.dumps(raw | settings))
    found = load_llm(folder, torch.float32)
    assert found.generation_config.to_diff_dict().keys() <= {"eos_token_id", "bos_token_id", "transformers_version"}
    ids = torch.arange(12)[None]
    plain = load_llm(write_llm(tmp_path / "plain", eos_token_id=7, bos_token_id=5), torch.float32)
    greedy = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(found.generate(ids, **greedy), plain.generate(ids, **greedy))


@pytest.mark.parametrize(
    "content",
    [
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        '{"eos_token_id": ',
        "[1]",
        '{"max_new_tokens": "many", "num_beams": -1, "cache_implementation": "nope"}',
    ],
)
def test_a_damaged_generation_config_is_refused_before_the_data_are_read(tmp_path, content):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(Refusal, match=r"K-(JSON|CONFIG)\] .*generation_config.json: not ") as refusal:
        read_llm_config(tmp_path)
    assert refusal.value.fix


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2048),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 4.0,
          "original_max_position_embeddings": 32768}}, 131072),
    ],
    ids=["plain", "llama-3.1", "vicuna-16k", "qwen2.5 with yarn"],
)  # fmt: skip
def test_the_longest_text_is_what_the_configuration_states(tmp_path, changes, expected):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SMALL}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert longest_text(read_llm_config(tmp_path)) == expected


def test_old_torch_folder_with_saved_frequencies(parts, tmp_path):
    """Llama-2 and Vicuna were published as ``.bin``, with a buffer in every layer that is no weight."""
    folder = write_llm(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    ids = torch.arange(12)[None]
    stock = AutoModelForCausalLM.from_pretrained(parts.llm)
    assert torch.equal(load_llm(folder, torch.float32)(ids).logits, stock(ids).logits)


def test_a_head_that_is_stored_although_tied(tmp_path):
    folder = write_llm(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"lm_head.weight": torch.zeros(320, 64)}, folder / "pytorch_model.bin")
    assert "lm_head.weight" not in read_llm_tensors(folder, read_llm_config(folder))
    assert load_llm(folder, torch.float32).lm_head.weight.any()


def test_an_architecture_whose_files_are_not_its_tensors(tmp_path):
    """Mixtral's experts lie in the file one by one and in memory as one tensor: an export by name would be wrong."""
    config = MixtralConfig(**SMALL, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    with pytest.raises(Refusal, match="K-KEYS"):
        load_llm(tmp_path / "m", torch.float32)


def test_rotary_settings_where_transformers_4_looks():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    old = with_old_rope({"rope_parameters": rope, "hidden_size": 8})
    assert old["rope_theta"] == 1e6 and old["rope_parameters"] == rope and old["hidden_size"] == 8
    assert old["rope_scaling"] == {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}
    plain = with_old_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert plain["rope_theta"] == 5e5 and plain["rope_scaling"] is None
    assert with_old_rope({"hidden_size": 8}) == {"hidden_size": 8}


# Writes a model of 2 GB, then assembles it in a process of its own and watches that process's anonymous memory.
WRITE = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, "tests")
from support.internlm2_reference import CONFIG
from llava_moslora.models.internlm2 import llama_config
folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
folder.mkdir()
config = CONFIG | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 15, "num_attention_heads": 16}
config |= {"num_key_value_heads": 4, "vocab_size": 32000}
(folder / "config.json").write_text(json.dumps(config))
shapes = {"attention.wqkv": (3072, 2048), "attention.wo": (2048, 2048), "feed_forward.w1": (8192, 2048)}
shapes |= {"feed_forward.w3": (8192, 2048), "feed_forward.w2": (2048, 8192)}
shapes |= {"attention_norm": (2048,), "ffn_norm": (2048,)}
weight_map = {}
for n in range(16):
    tensors = {f"model.layers.{n}.{k}.weight": torch.full(s, 0.01, dtype=dtype) for k, s in shapes.items()}
    if n == 15:
        words = ("model.tok_embeddings", "output")
        tensors = {f"{k}.weight": torch.full((32000, 2048), 0.01, dtype=dtype) for k in words}
        tensors["model.norm.weight"] = torch.ones(2048, dtype=dtype)
    file = f"pytorch_model-{n + 1:05d}-of-00016.bin"
    torch.save(tensors, folder / file)
    weight_map |= dict.fromkeys(tensors, file)
(folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
"""
ASSEMBLE = """
import sys, threading, time, torch
from llava_moslora.models.assemble import assemble
from llava_moslora.config import ModelSettings
from llava_moslora.text.tokenizer import load_tokenizer
llm, clip, projector, tokenizer = sys.argv[1:]
tokenizer = load_tokenizer(tokenizer)

def anonymous() -> int:
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

import deepspeed, transformers.models.llama  # what assembly imports is no weight
baseline, peak, running = anonymous(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.01)
thread = threading.Thread(target=watch)
thread.start()
model, _ = assemble(ModelSettings(llm, clip, projector), tokenizer=tokenizer, dtype=torch.bfloat16)
running = False
thread.join()
kept = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
print("RESULT", kept, max(peak, anonymous()) - baseline)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_assembly_holds_the_weights_once(parts, tmp_path, dtype):
    """As stored (mapped: nothing of it is anonymous but the split wqkv) and converted on the way (all of it is)."""
    folder = tmp_path / "m"
    subprocess.run([sys.executable, "-c", WRITE, folder, dtype], check=True, cwd=ROOT)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "bos_token_id"}))
    from support.tiny import write_projector

    projector = write_projector(tmp_path / "p.safetensors", llm=2048)
    command = [sys.executable, "-c", ASSEMBLE, folder, parts.clip, projector, parts.llm]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, above = (int(n) for n in done.stdout.split("RESULT")[1].split())
    print(f"kept {kept / 2**30:.2f} GiB, anonymous above baseline at most {above / kept:.3f} of it")
    assert kept > 2e9 and above <= 1.15 * kept


def test_a_run_is_no_llm(tmp_path):
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text("{}")
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint-2"):
        said = rf"C-PATH\] {folder}:--model_name_or_path: a run, and no LLM; .*fix: --output_dir {run} --resume True"
        with pytest.raises(Refusal, match=said):
            read_llm_config(folder)
    with pytest.raises(Refusal, match="no such folder"):
        read_llm_config(run / "checkpoint-3")
