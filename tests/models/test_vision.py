"""Vision towers: every spelling loads to the same numbers as its own library computes, or is refused by name."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionModel

from llava_moslora.errors import Refusal
from llava_moslora.models import open_clip as conversion
from llava_moslora.models.vision import from_open_clip, load_vision_tower, read_image_settings

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 3},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


def tiny_open_clip(**vision_cfg) -> tuple[dict, open_clip.CLIP]:
    cfg = TINY | {"quick_gelu": vision_cfg.pop("quick_gelu", False), "vision_cfg": TINY["vision_cfg"] | vision_cfg}
    torch.manual_seed(0)
    model = open_clip.CLIP(**cfg).eval()
    with torch.no_grad():  # open_clip starts biases at 0 and norms at 1, which would hide a mix-up
        for p in model.visual.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return cfg, model


def open_clip_folder(folder, cfg, model, preprocess=None):
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": cfg, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def largest_difference(visual, tower, batch=2) -> float:
    """Largest difference over every block's output and the projected class token, on random images."""
    size = tower.config.image_size
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    theirs = visual.forward_intermediates(pixels, output_fmt="NLC", output_extra_tokens=True)
    ours = tower(pixels, output_hidden_states=True)
    blocks = zip(theirs["image_intermediates_prefix"], theirs["image_intermediates"], strict=True)
    states = [torch.cat(pair, 1) for pair in blocks]
    assert len(ours.hidden_states) == len(states) + 1 == tower.config.num_hidden_layers + 1
    differences = [(a - b).abs().max().item() for a, b in zip(ours.hidden_states[1:], states, strict=True)]
    return max(*differences, (ours.pooler_output @ visual.proj - theirs["image_features"]).abs().max().item())


# --- parity with open_clip ---


@pytest.mark.parametrize(
    ("change", "activation"),
    [
        ({}, "gelu"),
        ({"quick_gelu": True}, "quick_gelu"),
        ({"act_kwargs": {"approximate": "tanh"}}, "gelu_pytorch_tanh"),
        ({"norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.5}, "gelu"),
        ({"final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d", "output_tokens": False}, "gelu"),
    ],
)
def test_a_converted_tower_computes_what_open_clip_computes(change, activation, tmp_path):
    cfg, model = tiny_open_clip(**change)
    tower, _ = load_vision_tower(f"open_clip:{open_clip_folder(tmp_path / 'f', cfg, model)}")
    assert tower.config.hidden_act == activation
    assert not tower.training
    assert largest_difference(model.visual, tower) <= 1e-5


def test_the_activation_matters():
    cfg, model = tiny_open_clip()
    tower, _ = from_open_clip(cfg | {"quick_gelu": True}, model.state_dict(), {})
    assert largest_difference(model.visual, tower) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14-336-quickgelu"])
def test_published_architectures_compute_what_open_clip_computes(arch, tmp_path):
    torch.manual_seed(0)
    model = open_clip.create_model(arch).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "epoch_1.pt")
    visual, mean = model.visual, model.visual.image_mean
    del model.transformer, model.token_embedding
    tower, processor = load_vision_tower(f"open_clip:{arch}@{tmp_path / 'epoch_1.pt'}")
    assert tower.config.hidden_act == ("quick_gelu" if arch.endswith("quickgelu") else "gelu")
    assert processor["image_mean"] == list(mean)
    assert largest_difference(visual, tower, batch=1) <= 1e-5


def test_a_tag_brings_its_own_weights_and_preprocessing(tmp_path, monkeypatch):
    cfg, model = tiny_open_clip()
    weights = open_clip_folder(tmp_path / "f", cfg, model) / "open_clip_model.safetensors"
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: cfg)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag_cfg: str(weights))
    tower, processor = load_vision_tower("open_clip:ViT-L-14@laion2b_s32b_b82k")
    assert processor["image_mean"] == [0.5, 0.5, 0.5]
    assert largest_difference(model.visual, tower) <= 1e-5


# --- transformers folders ---


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small ``CLIPModel`` as transformers saves it, preprocessing included, and its vision tower."""
    torch.manual_seed(3)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={**small, "image_size": 32, "patch_size": 8},
    )
    folder = tmp_path_factory.mktemp("clip") / "model"
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder, model.vision_model


@pytest.fixture
def tower_folder(clip_folder, tmp_path):
    """The same tower as a ``CLIPVisionModel`` folder in transformers-4 key names."""
    source, tower = clip_folder
    folder = tmp_path / "tower"
    folder.mkdir()
    tower.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "clip_vision_model"}))
    save_file({f"vision_model.{k}": v for k, v in tower.state_dict().items()}, folder / "model.safetensors")
    shutil.copy(source / "preprocessor_config.json", folder)
    return folder


@torch.no_grad()
def outputs(tower) -> list[torch.Tensor]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    result = tower(pixels, output_hidden_states=True)
    return [*result.hidden_states, result.pooler_output]


def same(tower, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(tower), outputs(other), strict=True))


def rewrite(folder, change):
    """Apply ``change`` to the folder's tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit(file, **changes):
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_both_generations_of_key_names_load_to_the_same_outputs(clip_folder, tower_folder, tmp_path):
    whole, reference = clip_folder
    assert same(load_vision_tower(whole)[0], reference)
    assert same(load_vision_tower(tower_folder)[0], reference)
    bare = shutil.copytree(tower_folder, tmp_path / "v5")
    rewrite(bare, lambda t: [t.update({k.removeprefix("vision_model."): t.pop(k)}) for k in list(t)])
    assert "embeddings.class_embedding" in load_file(bare / "model.safetensors")
    assert same(load_vision_tower(bare)[0], reference)
    again = tmp_path / "again"
    load_vision_tower(bare)[0].save_pretrained(again)
    shutil.copy(bare / "preprocessor_config.json", again)
    assert same(load_vision_tower(again)[0], reference)


def test_torch_files_sharded_files_and_saved_position_ids_load(clip_folder, tower_folder, tmp_path):
    _, reference = clip_folder
    tensors = load_file(tower_folder / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # as OpenAI's own folders have it
    binary, sharded = (shutil.copytree(tower_folder, tmp_path / name) for name in ("bin", "shards"))
    (binary / "model.safetensors").unlink()
    torch.save(tensors, binary / "pytorch_model.bin")
    assert same(load_vision_tower(binary)[0], reference)
    CLIPVisionModel.from_pretrained(tower_folder).save_pretrained(sharded, max_shard_size="40KB")
    (sharded / "model.safetensors").unlink(missing_ok=True)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert same(load_vision_tower(sharded)[0], reference)


def test_the_dtype_is_the_callers(tower_folder):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tower, _ = load_vision_tower(tower_folder, dtype)
        assert {p.dtype for p in tower.parameters()} == {dtype}


def test_the_demos_tower_loads_and_is_small():
    folder = Path(__file__).parents[2] / "playground" / "clip-tiny"
    tower, processor = load_vision_tower(folder)
    assert (tower.config.image_size, tower.config.patch_size) == (64, 16)
    assert processor["image_mean"] == processor["image_std"] == [0.5, 0.5, 0.5]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000


# --- preprocessing ---


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_gives_open_clips_pixels(mode, interpolation):
    cfg, model = tiny_open_clip()
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": interpolation, "resize_mode": mode}
    _, processor = from_open_clip(cfg, model.state_dict(), preprocess)
    random = np.random.default_rng(0)
    theirs = open_clip.image_transform(32, is_train=False, **preprocess)
    # After resizing, an odd surplus is cropped one pixel apart by the two libraries; these sizes leave an even one.
    for height, width in [(32, 32), (7, 7), (300, 300), (64, 96), (96, 64), (33, 66), (20, 40)]:
        image = Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))
        ours = CLIPImageProcessorPil(**processor)(image, return_tensors="pt")["pixel_values"][0]
        assert (ours - theirs(image)).abs().max() < 1e-6, (height, width)  # one grey level would be 0.01


def test_old_and_new_spellings_of_a_folders_preprocessing(tower_folder):
    file = tower_folder / "preprocessor_config.json"
    _, new = load_vision_tower(tower_folder)
    assert new["size"] == {"shortest_edge": 32} and new["crop_size"] == {"height": 32, "width": 32}
    edit(file, size=32, crop_size=32, image_processor_type=None, feature_extractor_type="CLIPFeatureExtractor")
    assert load_vision_tower(tower_folder)[1] == new
    nested = {"image_processor": json.loads(file.read_text()), "processor_class": "CLIPProcessor"}
    (tower_folder / "processor_config.json").write_text(json.dumps(nested))
    file.unlink()
    assert load_vision_tower(tower_folder)[1] == new


# --- refusals: transformers folders ---


def refused(spec) -> Refusal:
    with pytest.raises(Refusal) as caught:
        load_vision_tower(spec)
    assert "\n" not in caught.value.line()
    return caught.value


def test_a_missing_a_surplus_and_a_misshapen_tensor_are_named(tower_folder):
    good = load_file(tower_folder / "model.safetensors")
    rewrite(tower_folder, lambda t: t.pop("vision_model.encoder.layers.1.mlp.fc1.bias"))
    refusal = refused(tower_folder)
    assert (refusal.code, refusal.key) == ("K-KEYS", "encoder.layers.1.mlp.fc1.bias")
    save_file(good | {"vision_model.head.weight": torch.zeros(2)}, tower_folder / "model.safetensors")
    refusal = refused(tower_folder)
    assert (refusal.code, refusal.key) == ("K-KEYS", "head.weight")
    name = "vision_model.embeddings.position_embedding.weight"
    save_file(good | {name: torch.zeros(50, 32)}, tower_folder / "model.safetensors")
    refusal = refused(tower_folder)
    assert (refusal.code, refusal.found, refusal.expected) == ("K-SHAPE", [50, 32], [17, 32])
    assert refusal.file == tower_folder / "model.safetensors"


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_safetensors_file_is_named(tower_folder, size):
    file = tower_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refusal = refused(tower_folder)
    assert (refusal.code, refusal.file) == ("K-DAMAGED", file)


# K4: a truncated torch file
def test_truncated_and_poisoned_torch_files_are_named_and_run_nothing(tower_folder, tmp_path):
    tensors = load_file(tower_folder / "model.safetensors")
    (tower_folder / "model.safetensors").unlink()
    file = tower_folder / "pytorch_model.bin"
    torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    assert refused(tower_folder).code == "K-DAMAGED"

    class Poison:
        def __reduce__(self):
            return (open, (str(tmp_path / "sentinel"), "w"))

    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"vision_model.post_layernorm.bias": Poison()}, file)
        assert refused(tower_folder).code == "K-DAMAGED"
        assert not (tmp_path / "sentinel").exists()


# K13: paths and links out of the folder
def test_a_missing_shard_is_named(tower_folder):
    (tower_folder / "model.safetensors").unlink()
    index = {"weight_map": {"embeddings.class_embedding": "model-00001-of-00002.safetensors"}}
    (tower_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(tower_folder).file == tower_folder / "model-00001-of-00002.safetensors"
    index["weight_map"]["embeddings.class_embedding"] = "../elsewhere.safetensors"
    (tower_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(tower_folder).code == "K-MISSING"


@pytest.mark.parametrize(
    ("change", "code", "key"),
    [
        ({"model_type": "siglip_vision_model"}, "K-KEYS", "embeddings.patch_embedding.bias"),
        ({"model_type": "siglip2_vision_model"}, "K-TOWER", "model_type"),
        ({"num_attention_heads": 5}, "K-CONFIG", None),
        ({"image_size": [32, 64]}, "K-CONFIG", "image_size"),
        ({"model_type": None}, "K-TOWER", "model_type"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "K-CODE", "auto_map"),
        ({"quantization_config": {"load_in_4bit": True}}, "K-QUANT", "quantization_config"),
        ({"hidden_size": "wide"}, "K-CONFIG", None),
    ],
)
def test_configurations_that_are_not_a_plain_tower(tower_folder, change, code, key):
    edit(tower_folder / "config.json", **change)
    refusal = refused(tower_folder)
    assert (refusal.code, refusal.key) == (code, key)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"crop_size": {"height": 28, "width": 28}}, "crop_size"),
        ({"do_center_crop": False}, "size"),
        ({"image_mean": None}, "image_mean"),
        ({"image_std": [0.5]}, "image_std"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type"),
        ({"image_processor_type": ["CLIPImageProcessor"]}, "image_processor_type"),
        ({"do_resize": False}, "do_resize"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_center_crop": "false"}, "do_center_crop"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
        ({"image_std": [0.3, 0, 0.3]}, "image_std"),
        ({"image_std": [0.3, float("inf"), 0.3]}, "image_std"),
        ({"image_mean": [True, True, True]}, "image_mean"),
        ({"image_mean": "0.5"}, "image_mean"),
        ({"image_mean": [124, 116, 104]}, "image_mean"),
        ({"resample": "bicubic"}, "resample"),
        ({"resample": 9}, "resample"),
        ({"size": "32"}, "size"),
        ({"size": {"shortest_edge": 10**6}}, "size"),
        ({"size": {"shortest_edge": -32}}, "size"),
        ({"size": {"longest_edge": 32}}, "size"),
        ({"size": {"shortest_edge": 32.5}}, "size"),
        ({"crop_size": [32, 32]}, "crop_size"),
        ({"crop_size": {"height": "32", "width": "32"}}, "crop_size"),
    ],
)
def test_preprocessing_that_does_not_fit_the_tower(tower_folder, change, key):
    edit(tower_folder / "preprocessor_config.json", **change)
    refusal = refused(tower_folder)
    assert (refusal.code, refusal.key) == ("K-PROCESSOR", key)


def test_preprocessing_is_refused_before_a_weight_is_read(tower_folder):
    edit(tower_folder / "preprocessor_config.json", do_normalize=False)
    (tower_folder / "model.safetensors").unlink()
    with pytest.raises(
        Refusal, match=r"K-PROCESSOR\] .*preprocessor_config.json:do_normalize: .*found False; expected"
    ):
        read_image_settings(tower_folder)
    assert refused(tower_folder).key == "do_normalize"


@pytest.mark.parametrize(("change", "key"), [({"mean": "grey"}, "image_mean"), ({"std": [0, 0, 0]}, "image_std")])
def test_open_clips_preprocessing_that_is_none(change, key):
    cfg, model = tiny_open_clip()
    with pytest.raises(Refusal, match=rf"K-PROCESSOR\] .*{key}: not usable"):
        from_open_clip(cfg, model.state_dict(), change)


def test_missing_files_are_named(tower_folder, tmp_path):
    assert refused(tmp_path / "nowhere").code == "K-MISSING"
    for name in ("preprocessor_config.json", "config.json"):
        content = (tower_folder / name).read_text()
        (tower_folder / name).unlink()
        assert refused(tower_folder).file == tower_folder / name
        (tower_folder / name).write_text(content[:-10])
        refusal = refused(tower_folder)
        assert (refusal.code, refusal.file) == ("K-JSON", tower_folder / name)
        (tower_folder / name).write_text(content)
    (tower_folder / "model.safetensors").unlink()
    assert "model.safetensors" in str(refused(tower_folder))


# --- refusals: open_clip ---


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("RN50", "ResNet"),
        ("EVA02-B-16", "timm model"),
        ("ViT-B-16-SigLIP", "timm model"),
        ("coca_ViT-B-32", "attentional_pool"),
        ("ViT-L-14-CLIPA", "no_ln_pre"),
        ("ViT-M-16-alt", "ls_init_value"),
    ],
)
def test_towers_that_are_not_plain_clip_are_refused_with_the_reason_and_the_list(arch, reason):
    refusal = refused(f"open_clip:{arch}@weights.safetensors")
    assert reason in refusal.what
    assert "ViT-L-14-336-quickgelu" in refusal.expected and arch not in refusal.expected.split(", ")
    assert "give a SigLIP as its transformers folder" in refusal.fix


def test_open_clip_names_that_do_not_exist(tmp_path):
    assert refused("open_clip:ViT-L-15@file.pt").found == "ViT-L-15"
    assert "laion2b_s34b_b79k" in refused("open_clip:ViT-B-32@no_such_tag_or_file").expected
    assert refused("open_clip:no-such-folder").code == "K-MISSING"
    assert refused(f"open_clip:{tmp_path}").file == tmp_path / "open_clip_config.json"
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": 3}}')
    assert refused(f"open_clip:{tmp_path}").code == "K-CONFIG"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": "64"}, "not a usable"),
        ({"head_width": 0}, "head_width: out of range"),
        ({"head_width": None}, "not a usable"),
        ({"mlp_ratio": []}, "not a usable"),
        ({"norm_kwargs": 3}, "not a usable"),
        ({"act_kwargs": "tanh"}, "act_kwargs = tanh"),
        ({"layers": 10**9}, "layers: out of range"),
        ({"image_size": [32, 32]}, "image_size = "),
        ({"timm_model_name": ["x"]}, "timm model"),
        ({"": 1}, "vision_cfg has  = 1"),
    ],
)
def test_open_clips_vision_cfg_that_is_none(tmp_path, change, said):
    cfg, model = tiny_open_clip()
    folder = open_clip_folder(tmp_path / "f", cfg, model)
    edit(folder / "open_clip_config.json", model_cfg=cfg | {"vision_cfg": cfg["vision_cfg"] | change})
    refusal = refused(f"open_clip:{folder}")
    assert refusal.code in ("K-CONFIG", "K-TOWER") and said in refusal.line(), refusal.line()
    assert refusal.file == folder / "open_clip_config.json"


def test_a_tag_trained_with_the_other_gelu_is_refused():
    refusal = refused("open_clip:ViT-L-14@openai")
    assert (refusal.code, refusal.expected) == ("C-TOWER", "ViT-L-14-quickgelu")


PUBLISHED = {
    "quick GELU": ("ViT-B-32", {"quick_gelu": True}, {}, "hidden_act quick_gelu", "open_clip:ViT-B-32-quickgelu@"),
    "exact GELU": ("ViT-B-32-quickgelu", {"quick_gelu": False}, {}, "hidden_act gelu", "open_clip:ViT-B-32@"),
    "tanh GELU": ("ViT-B-32", {}, {"act_kwargs": {"approximate": "tanh"}}, "hidden_act gelu_pytorch_tanh", "rename it"),
    "another eps": ("ViT-B-32", {}, {"norm_kwargs": {"eps": 1e-6}}, "layer_norm_eps 1e-06", "rename it"),
    "heads": ("ViT-B-32", {}, {"head_width": 32}, "num_attention_heads 24", "rename it"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_that_were_published_as_another_tower_are_refused(tmp_path, name):
    """The tensors of all of them fit: only the file beside them says what they are."""
    arch, change, of_tower, found, fix = PUBLISHED[name]
    cfg = open_clip.get_model_config(arch)
    file, beside = tmp_path / "epoch_1.pt", tmp_path / "open_clip_config.json"
    file.touch()
    beside.write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    assert conversion.find_source(f"open_clip:{arch}@{file}")[0] == cfg
    beside.write_text(json.dumps({"model_cfg": cfg | change | {"vision_cfg": cfg["vision_cfg"] | of_tower}}))
    refusal = refused(f"open_clip:{arch}@{file}")
    assert (refusal.code, refusal.file, refusal.found) == ("C-TOWER", beside, found) and fix in refusal.fix
    beside.write_text(json.dumps({"model_cfg": cfg | {"vision_cfg": {"timm_model_name": "x"}}}))
    assert refused(f"open_clip:{arch}@{file}").code == "K-TOWER"
    beside.write_text('{"model_cfg": 3}')
    assert refused(f"open_clip:{arch}@{file}").code == "K-CONFIG"


def test_an_open_clip_checkpoint_that_does_not_fit_is_refused_by_tensor(tmp_path):
    cfg, model = tiny_open_clip()
    state = model.state_dict()
    block = "visual.transformer.resblocks.2.attn.in_proj_weight"

    def code_and_key(tensors, cfg=cfg):
        with pytest.raises(Refusal) as caught:
            from_open_clip(cfg, tensors, {}, source=tmp_path)
        return caught.value.code, caught.value.key

    layer = "encoder.layers.2.self_attn."
    assert code_and_key({k: v for k, v in state.items() if k != block}) == ("K-KEYS", f"{layer}k_proj.weight")
    assert code_and_key(state | {"visual.attn_pool.query": torch.zeros(3)}) == ("K-KEYS", "visual.attn_pool.query")
    assert code_and_key(state | {block: torch.zeros(96, 64)}) == ("K-SHAPE", f"{layer}k_proj.weight")
    assert code_and_key({"logit_scale": torch.zeros(())}) == ("K-KEYS", None)
    # Another resolution means another position table: open_clip would resample it, this package does not.
    larger = cfg | {"vision_cfg": cfg["vision_cfg"] | {"image_size": 48}}
    assert code_and_key(state, larger) == ("K-SHAPE", "embeddings.position_embedding.weight")
    with pytest.raises(Refusal, match="resize_mode"):
        from_open_clip(cfg, state, {"resize_mode": "longest"})


def test_without_open_clip_the_refusal_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refusal = refused("open_clip:ViT-B-32@file")
    assert refusal.code == "E-PACKAGE" and "[clip]" in refusal.fix


def test_every_supported_architecture_is_plain():
    names = conversion.plain_architectures()
    assert {"ViT-B-32", "ViT-L-14-336-quickgelu", "ViT-H-14"} <= set(names)
    assert not [name for name in names if "SigLIP" in name or "EVA" in name or name.startswith("RN")]
