"""SigLIP towers, which have no class token: every layout of a folder, and the composed model against stock parts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava_moslora.config import ModelSettings, TowerAdapter
from llava_moslora.errors import Refusal
from llava_moslora.models.adapt import add_adapters
from llava_moslora.models.assemble import assemble, model_on_meta
from llava_moslora.models.llava_folder import name_parts
from llava_moslora.models.projector import read_projector
from llava_moslora.models.towers import tokens_per_image
from llava_moslora.models.vision import load_vision_tower, read_vision_config
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer
from support.settings import adapters, parts_of
from support.tiny import tiny_tokenizer, write_projector, write_siglip

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SO400M |= {"image_size": 384, "patch_size": 14}


@torch.no_grad()
def outputs(tower) -> list[torch.Tensor]:
    size = tower.config.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    result = tower(pixels, output_hidden_states=True)
    return [*result.hidden_states, result.last_hidden_state, *([result.pooler_output] if tower.use_head else [])]


def same(tower, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(tower), outputs(other), strict=True))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- folders ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory, parts):
    """A small ``SiglipModel``, texts included, as transformers saves it, and its vision tower."""
    torch.manual_seed(3)
    tower = SiglipVisionConfig.from_pretrained(parts.siglip)
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = SiglipModel(SiglipConfig(text_config=text | {"vocab_size": 50}, vision_config=tower.to_dict())).eval()
    folder = tmp_path_factory.mktemp("siglip") / "model"
    model.save_pretrained(folder)
    shutil.copy(parts.siglip / "preprocessor_config.json", folder)
    return folder, model.vision_model


def test_a_complete_model_and_a_tower_in_both_generations_of_names(whole, parts, tmp_path):
    folder, reference = whole
    assert any(name.startswith("text_model.") for name in load_file(folder / "model.safetensors"))
    assert "logit_bias" in load_file(folder / "model.safetensors")
    assert same(load_vision_tower(folder)[0], reference)
    stock = SiglipVisionModel.from_pretrained(parts.siglip).eval()
    for level in ("", "vision_model."):  # transformers 5.6 and later, and before
        copy = shutil.copytree(parts.siglip, tmp_path / f"level {level}")
        save_file({level + name: t for name, t in stock.state_dict().items()}, copy / "model.safetensors")
        assert same(load_vision_tower(copy)[0], stock)


def test_a_published_configuration_leaves_out_what_is_the_default(tmp_path):
    """google/siglip-base-patch16-224 has nothing of its tower in config.json but the model_type."""
    config = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_vision_config(tmp_path)
    assert (found.hidden_size, found.num_hidden_layers, found.hidden_act) == (768, 12, "gelu_pytorch_tanh")
    assert tokens_per_image(found) == 14 * 14


def test_a_tower_without_a_pooling_head(tmp_path):
    folder = write_siglip(tmp_path / "siglip", vision_use_head=False)
    assert not any(name.startswith("head.") for name in load_vision_tower(folder)[0].state_dict())
    assert same(load_vision_tower(folder)[0], SiglipVisionModel.from_pretrained(folder).eval())


def test_preprocessing_is_the_folders(parts, tmp_path):
    settings = load_vision_tower(parts.siglip)[1]
    assert settings["image_processor_type"] == "SiglipImageProcessor" and not settings["do_center_crop"]
    assert (settings["size"], settings["resample"]) == ({"height": 34, "width": 34}, 3)
    folder = shutil.copytree(parts.siglip, tmp_path / "siglip")
    edit(folder / "preprocessor_config.json", resample=2, size=34)  # SigLIP 2 has the other filter
    assert load_vision_tower(folder)[1] == settings | {"resample": 2}


# --- the composed model ---


def build(parts, **changes):
    tokenizer = load_tokenizer(parts.llm)
    settings = parts_of(parts.llm, changes.get("tower", parts.siglip), parts.projector)
    model, _ = assemble(settings, tokenizer=tokenizer, dtype=torch.float32)
    return model, tokenizer


def asked(image: int) -> dict[str, torch.Tensor]:
    """Two rows, an image of 16 patches in each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (2, 30), generator=generator)
    ids[:, 1:17] = image
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 34, 34, generator=generator)}


@torch.no_grad()
def stock_llava(parts, rows: int, image: int) -> LlavaForConditionalGeneration:
    """The same three parts by transformers alone, complete, as its own documentation would put them together."""
    llm, tower = AutoModelForCausalLM.from_pretrained(parts.llm), SiglipVisionModel.from_pretrained(parts.siglip)
    llm.resize_token_embeddings(rows, mean_resizing=False)
    config = LlavaConfig(text_config=llm.config, vision_config=tower.config, image_token_index=image,
                         vision_feature_layer=-2, vision_feature_select_strategy="full")  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    projector = read_projector(parts.projector, 32, 64)
    model.model.multi_modal_projector.load_state_dict(projector)
    return model.eval()


@torch.no_grad()
def test_logits_and_features_are_stock_transformers(parts):
    model, tokenizer = build(parts)
    image = image_token_id(tokenizer)
    inputs = asked(image)
    stock = stock_llava(parts, len(tokenizer), image)
    found, expected = model.eval()(**inputs).logits, stock(**inputs).logits
    assert torch.equal(found[..., :image], expected[..., :image])  # the row of <image> itself is ours
    pixels = inputs["pixel_values"]
    found, expected = (torch.stack(m.get_image_features(pixels).pooler_output) for m in (model, stock))
    assert found.shape == (2, 16, 64) and torch.equal(found, expected)


def test_what_is_never_read_is_not_in_memory(parts):
    model, _ = build(parts)
    tower = model.model.vision_tower
    assert len(tower.encoder.layers) == 2 and not [name for name, _ in tower.named_modules() if "head" in name]
    assert model.config.vision_config.num_hidden_layers == 3  # as the folder has it
    assert model.config.vision_feature_select_strategy == "full" and model.config.image_seq_length == 16


def test_one_step_trains_the_adapters_of_both_towers(parts):
    model, tokenizer = build(parts)
    model = add_adapters(model, adapters(TowerAdapter(4, 8, 0.0), TowerAdapter(2, 4, 0.0)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapted = {name.split(".lora_")[0].rpartition("vision_tower.")[2] for name in trained if "vision_tower" in name}
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    assert adapted == {f"encoder.layers.{layer}.{linear}" for layer in (0, 1) for linear in linears}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    inputs = asked(image_token_id(tokenizer))
    labels = inputs["input_ids"].clone()
    labels[:, :20] = -100
    for _ in range(2):  # in the first, B is 0 and alone has a gradient
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert not [name for name, p in trained.items() if torch.equal(p, before[name])]


def test_a_batch_without_images_still_passes_the_tower(parts):
    """Every parameter takes part, or a rank of ZeRO-3 would wait for it; the last norm is in the tower, and unread."""
    model, _ = build(parts)
    model.requires_grad_(True)
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    tower = dict(model.model.vision_tower.named_parameters())
    assert {name for name, p in tower.items() if p.grad is None} == {"post_layernorm.weight", "post_layernorm.bias"}
    assert not any(p.grad.any() for p in tower.values() if p.grad is not None)


def test_sizes_on_paper_of_so400m():
    """google/siglip-so400m-patch14-384: 729 patches, 27 layers of which 26 are computed; no head in memory."""
    vision = SiglipVisionConfig(**SO400M)
    assert tokens_per_image(vision) == 27 * 27 == 729
    towers = adapters(TowerAdapter(8, 8), TowerAdapter(64, 16))
    model = model_on_meta(LlamaConfig(num_hidden_layers=1), vision, towers)
    tower = {name: p.numel() for name, p in model.named_parameters() if "vision_tower" in name}
    e, f = vision.hidden_size, vision.intermediate_size
    layer = 4 * (e * e + e) + 2 * e * f + e + f + 4 * e
    base = 3 * 14 * 14 * e + e + 729 * e + 26 * layer + 2 * e
    assert sum(n for name, n in tower.items() if "lora_" not in name) == base
    factors = sum(n for name, n in tower.items() if "lora_A" in name or "lora_B" in name)
    assert factors == 26 * 64 * (4 * 2 * e + 2 * (e + f)) and not any("head" in name for name in tower)


# --- a complete LLaVA ---


@pytest.fixture(scope="module")
def complete(tmp_path_factory, parts):
    """A LLaVA around a SigLIP, as transformers saves it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    model = stock_llava(parts, len(tokenizer), len(tokenizer) - 1)
    folder = tmp_path_factory.mktemp("llava") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(parts.siglip / "preprocessor_config.json", folder)
    return folder, model


@torch.no_grad()
def test_a_complete_llava_is_a_start(complete):
    folder, stock = complete
    tokenizer = load_tokenizer(folder)
    image = image_token_id(tokenizer)
    model, settings = assemble(name_parts(ModelSettings(str(folder))), tokenizer=tokenizer, dtype=torch.float32)
    assert settings["image_processor_type"] == "SiglipImageProcessor"
    assert torch.equal(model.eval()(**asked(image)).logits, stock(**asked(image)).logits)


@pytest.mark.parametrize("wrong", ["default", None])
def test_a_llava_that_drops_a_patch_is_refused(complete, tmp_path, wrong):
    """ "default" takes the first token for a class token, which SigLIP has not; it is also what absence means."""
    folder = shutil.copytree(complete[0], tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text()) | {"vision_feature_select_strategy": wrong}
    (folder / "config.json").write_text(json.dumps({key: v for key, v in raw.items() if v is not None}))
    with pytest.raises(Refusal, match=r"vision_feature_select_strategy: .*found default; expected full"):
        load_vision_tower(folder)


# --- refusals ---


CONFIGURATIONS = [
    ({"model_type": "siglip2_vision_model"}, "K-TOWER", "model_type", "NaFlex.*siglip2-so400m-patch14-384.*works"),
    ({"model_type": "clip_vision_model"}, "K-KEYS", None, "tensors"),
    ({"num_hidden_layers": 4}, "K-KEYS", None, "encoder.layers.3"),
    ({"hidden_size": 48}, "K-SHAPE", None, r"found .*32.*expected .*48"),
    (
        {"num_attention_heads": 5},
        "K-CONFIG",
        None,
        "no SiglipVisionModel can be built .*; found .*divisible by num_heads",
    ),
    ({"hidden_act": "geglu"}, "K-CONFIG", None, "no SiglipVisionModel can be built .*; found .*geglu"),
    ({"image_size": [34, 68]}, "K-CONFIG", "image_size", "not a single side length; found .34, 68."),
    ({"image_size": 48}, "K-PROCESSOR", "size", "48×48"),
    ({"vision_use_head": False}, "K-KEYS", None, "head"),
    ({"auto_map": {"AutoModel": "code.Model"}}, "K-CODE", "auto_map", "custom code"),
]


@pytest.mark.parametrize(("changes", "code", "key", "said"), CONFIGURATIONS)
def test_a_configuration_of_something_else(parts, tmp_path, changes, code, key, said):
    folder = shutil.copytree(parts.siglip, tmp_path / "siglip")
    edit(folder / "config.json", **changes)
    with pytest.raises(Refusal, match=said) as caught:
        load_vision_tower(folder)
    assert caught.value.code == code and key in (None, caught.value.key)


def test_a_projector_for_another_width(parts, tmp_path):
    projector = write_projector(tmp_path / "p.safetensors", vision=48)
    with pytest.raises(Refusal, match=r"found \[64, 48\]; expected \[64, 32\]"):
        read_projector(projector, read_vision_config(parts.siglip).hidden_size, 64)
