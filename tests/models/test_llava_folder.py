"""A complete LLaVA's folder stands for each of its three parts."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_moslora.config import ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import assemble
from llava_moslora.models.llava_folder import name_parts
from llava_moslora.models.llm import load_llm, read_llm_config
from llava_moslora.models.projector import read_projector
from llava_moslora.models.vision import load_vision_tower
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer
from support.settings import parts_of
from support.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def complete(tmp_path_factory, parts):
    """A llava-hf folder as transformers saves it, and the model."""
    folder = tmp_path_factory.mktemp("llava") / "model"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=384, rope_theta=5e5, bos_token_id=None),
        vision_config=CLIPVisionConfig(**tower, image_size=32, patch_size=8),
        image_token_index=len(tokenizer) - 1,
        image_seq_length=16,
    )
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(parts.clip / "preprocessor_config.json", folder)
    return folder, model


def rename(folder, target, pattern: dict[str, str]):
    """A copy of ``folder`` with its tensors renamed."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    for old, new in pattern.items():
        tensors = {re.sub(old, new, name): t for name, t in tensors.items()}
    save_file(tensors, target / "model.safetensors")
    return target


# How other versions spell what this one saves.
SPELLINGS = {
    "as this version saves it": {},
    "published": {r"^vision_tower\.(?!vision_model)": "vision_tower.vision_model."},
    "as in memory": {
        r"^language_model\.lm_head": "lm_head",
        r"^language_model\.model": "model.language_model",
        r"^(vision_tower|multi_modal_projector)": r"model.\1",
    },
}


@torch.no_grad()
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_whole_computes_what_transformers_computes(complete, tmp_path, spelling):
    folder, stock = complete
    folder = rename(folder, tmp_path / "m", SPELLINGS[spelling])
    tokenizer = load_tokenizer(folder)
    model, _ = assemble(name_parts(ModelSettings(str(folder))), tokenizer=tokenizer, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (1, 30), generator=generator)
    ids[:, 1:17] = image_token_id(tokenizer)
    pixels = torch.randn(1, 3, 32, 32, generator=generator)
    assert model.config.text_config.rope_parameters["rope_theta"] == 5e5
    expected = stock(input_ids=ids, pixel_values=pixels).logits
    found = model.eval()(input_ids=ids, pixel_values=pixels).logits
    assert found.shape == expected.shape  # the padded rows of the vocabulary are kept, none is added
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def original(complete, target, vision: bool = False):
    """The same LLM and projector in the original LLaVA's layout."""
    folder, model = complete
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("language_model."):
            renamed[name.removeprefix("language_model.")] = tensor
        elif name.startswith("multi_modal_projector.linear_"):
            number = {"1": "0", "2": "2"}[name[len("multi_modal_projector.linear_")]]
            renamed[f"model.mm_projector.{number}.{name.rpartition('.')[2]}"] = tensor
        elif vision:
            renamed["model.vision_tower.vision_tower.vision_model." + name.removeprefix("vision_tower.")] = tensor
    save_file(renamed, target / "model.safetensors")
    text = model.config.text_config.to_dict()
    config = {key: text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    config |= {key: text[key] for key in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps")}
    config |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "rope_theta": 5e5}
    config |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    config |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "auto_map": {"AutoModel": "code.Model"}}
    (target / "config.json").write_text(json.dumps(config))
    return target


@torch.no_grad()
def test_original_llava_gives_llm_and_projector(complete, tmp_path):
    folder = original(complete, tmp_path / "m")
    stock = complete[1]
    llm = load_llm(folder, torch.float32)
    ids = torch.randint(3, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(llm(ids).logits, stock(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert not [key for key in llm.config.to_dict() if key.startswith("mm_")]
    projector = read_projector(folder, 32, 64)
    assert torch.equal(projector["linear_2.weight"], stock.model.multi_modal_projector.linear_2.weight)
    with pytest.raises(Refusal, match=r"mm_vision_tower: .*found openai/clip.*--vision_tower"):
        load_vision_tower(folder)


def test_a_tower_that_was_trained_is_not_left_behind(complete, tmp_path):
    folder = original(complete, tmp_path / "m", vision=True)
    for read in (read_llm_config, load_vision_tower):
        with pytest.raises(
            Refusal, match=r"a vision tower was trained with this LLM, .*found openai/clip.*clip-vit-large"
        ):
            read(folder)


@torch.no_grad()
@pytest.mark.parametrize("place", ["next to it", "named"])
def test_an_original_llava_with_its_own_tower_is_a_vision_source(complete, parts, tmp_path, place):
    """XTuner's ``…-hf`` folders: the tower's weights are inside, how it is built says the tower's own folder."""
    folder, stock = original(complete, tmp_path / "m", vision=True), complete[1]
    described = tmp_path / ("clip-vit-large-patch14-336" if place == "next to it" else "elsewhere")
    described.mkdir()
    for name in ("config.json", "preprocessor_config.json"):  # no weights
        shutil.copy(parts.clip / name, described)
    if place == "named":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(described)}))
    tiny_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    image = image_token_id(tokenizer)
    model, settings = assemble(name_parts(ModelSettings(str(folder))), tokenizer=tokenizer, dtype=torch.float32)
    assert settings["crop_size"] == {"height": 32, "width": 32}
    ids = torch.randint(3, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids[:, 1:17] = image
    found = model.eval()(input_ids=ids, pixel_values=pixels).logits
    ids[:, 1:17] = stock.config.image_token_id
    torch.testing.assert_close(found, stock(input_ids=ids, pixel_values=pixels).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(Refusal, match=r"--vision_tower: not the vision tower that was .*omit --vision_tower"):
        assemble(parts_of(folder, parts.clip, folder), tokenizer=tokenizer, dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"vision_feature_layer": -1}, "vision_feature_layer"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias"),
        ({"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava"}, "architectures"),
    ],
)
def test_another_kind_of_llava_is_refused(complete, tmp_path, changes, key):
    folder = shutil.copytree(complete[0], tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    for read in (read_llm_config, load_vision_tower, lambda f: read_projector(f, 32, 64)):
        with pytest.raises(Refusal) as caught:
            read(folder)
        assert (caught.value.code, caught.value.key) == ("C-MODEL", key)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda raw: raw.update(text_config=[]), "text_config"),
        (lambda raw: raw.update(vision_config="clip"), "vision_config"),
        (lambda raw: raw.update(architectures="LlavaForConditionalGeneration"), "architectures"),
        (lambda raw: raw.update(model_type=3), "model_type"),
        (lambda raw: raw["text_config"].update(num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda raw: raw["text_config"].update(vocab_size=-1), "vocab_size"),
        (lambda raw: raw["vision_config"].update(hidden_size=2**40), "hidden_size"),
        (lambda raw: raw["vision_config"].update(patch_size=0), "patch_size"),
    ],
)
def test_sizes_and_parts_out_of_range_are_refused_before_anything_is_built(complete, tmp_path, change, key):
    folder = shutil.copytree(complete[0], tmp_path / "m")
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    for read in (read_llm_config, load_vision_tower, lambda f: read_projector(f, 32, 64), named):
        with pytest.raises(Refusal) as caught:
            read(folder)
        assert (caught.value.code, caught.value.key) == ("K-CONFIG", key)
        assert caught.value.file == folder / "config.json"


def named(folder) -> tuple[str, ...]:
    """What stands for LLM, vision tower and projector where only this folder was named."""
    parts = name_parts(ModelSettings(str(folder)))
    return parts.model_name_or_path, parts.vision_tower, parts.pretrain_mm_mlp_adapter


def test_the_parts_of_a_complete_llava_are_named(complete, parts, tmp_path):
    assert named(parts.llm) == (str(parts.llm), None, None)  # an LLM alone
    assert named(complete[0]) == (str(complete[0]),) * 3
    folder = tmp_path / "xtuner"
    for name in ("projector", "visual_encoder"):
        (folder / name).mkdir(parents=True)
    assert named(folder) == (str(folder), str(folder / "visual_encoder"), str(folder / "projector"))
    (folder / "llm").mkdir()
    assert named(folder)[0] == str(folder / "llm")
    (folder / "visual_encoder_adapter").mkdir()
    with pytest.raises(Refusal, match="adapters that are not merged"):
        named(folder)


def test_parts_that_are_named_stay_as_they_are(complete, parts):
    own = ModelSettings(str(complete[0]), pretrain_mm_mlp_adapter="other.safetensors")
    assert name_parts(own).pretrain_mm_mlp_adapter == "other.safetensors"
    given = ModelSettings(str(parts.llm), str(parts.clip))
    assert name_parts(given) == given
