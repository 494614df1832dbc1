"""Wrong inputs: each is one refusal, before a weight is read; text embeddings are the pipeline's."""

import importlib.util
import json
import shutil

import pytest
import torch

from llava_moslora.diffusion import parts as parts_module
from llava_moslora.diffusion.command_line import parse
from llava_moslora.diffusion.encode import embed_prompt, encode_once, prompt_ids
from llava_moslora.diffusion.parts import open_folder, require_diffusers
from llava_moslora.diffusion.subjects import find_pictures
from llava_moslora.errors import Refusal
from llava_moslora.sdxl_settings import SubjectSettings
from support.sdxl import PROMPT, needs_diffusers, pictures_of

GIVEN = ["--model_name_or_path", "sdxl", "--image_folder", "p", "--prompt", "a photo of ikat cat", "--output_dir", "r"]


def test_diffusers_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"E-MISSING.*diffusers.*pip install 'llava_moslora\[diffusion\]'"):
        require_diffusers()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt", "  "], "--prompt: an empty prompt"),
        (["--resolution", "100"], "--resolution.*multiple of 8"),
        (["--class_prompt", "a photo of cat"], "--class_prompt.*--class_image_folder"),
        (["--prior_loss_weight", "0.5"], "--prior_loss_weight.*class pictures"),
        (["--snr_gamma", "0"], "--snr_gamma.*above 0"),
        (["--snr_gamma", "-5"], "--snr_gamma.*above 0"),
        (["--lora_r", "0"], "--lora_r.*nothing to train"),
        (["--lora_r", "3", "--mixer_init", "butterfly"], r"C-RANK\] --lora_r.*found 3; expected even"),
        (["--lora_alpha", "0"], "--lora_alpha.*above 0"),
        (["--lora_alpha", "nan"], "--lora_alpha.*above 0"),
        (["--lora_dropout", "1"], "--lora_dropout.*below 1"),
        (["--mixer_lr", "1e-3", "--train_mixer", "False"], "--mixer_lr: no effect with --train_mixer False"),
        (["--riemannian", "True"], "--riemannian: unknown flag"),
        (["--lora_plus_ratio", "16"], "--lora_plus_ratio: unknown flag"),
        (["--method", "dora"], "--method: unknown flag"),
        (["--recompute", "selective"], r"--recompute.*none \| full"),
        (["--recompute", "auto"], r"--recompute: .*found auto; expected none \| full"),
        (["--vision_tower", "clip"], "--vision_tower: unknown flag"),
        (["--eval_strategy", "steps"], "--eval_strategy: unknown flag.*no effect here"),
        (["--mixer_init", "zeros"], "--mixer_init"),
        (["--init_lora_weights", "pissa"], "--init_lora_weights"),
    ],
)
def test_wrong_flags(more, message):
    parse(GIVEN)
    with pytest.raises(Refusal, match=message):
        parse([*GIVEN, *more])


def test_a_model_that_is_no_folder(tmp_path):
    with pytest.raises(Refusal, match=r"C-PATH\] .*--model_name_or_path: no such folder.*fix: check the path"):
        open_folder(tmp_path / "none")
    (tmp_path / "sd_xl_base_1.0.safetensors").write_bytes(b"")
    with pytest.raises(Refusal, match=r"C-PATH\] .*: a file, not a folder.*converted by diffusers' scripts"):
        open_folder(tmp_path / "sd_xl_base_1.0.safetensors")


def without(name):
    return lambda folder: shutil.rmtree(folder / name)


def changed(part, **values):
    def change(folder):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def no_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


@needs_diffusers
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        *((without(part), f"K-MISSING.*{part}") for part in ("unet", "vae", "text_encoder", "text_encoder_2")),
        (without("tokenizer_2"), r"K-MISSING.*tokenizer_2"),
        (without("scheduler"), r"K-MISSING.*scheduler"),
        (no_weights, r"K-MISSING.*no weights of the unet"),
        (changed("unet", addition_embed_type=None), r"K-MODEL.*not a Stable Diffusion XL's.*text_time"),
        (changed("unet", in_channels=9), r"K-MODEL.*inpainting"),
        (changed("unet", _class_name="FluxTransformer2DModel"), r"K-MODEL.*FluxTransformer2DModel"),
        (changed("text_encoder_2", architectures=["CLIPTextModel"]), r"K-MODEL.*text_encoder_2"),
        (changed("vae", latents_mean=[0.1]), r"K-MODEL.*latents_mean"),
    ],
)
def test_what_is_not_sdxl(parts, tmp_path, spoil, message):
    folder = tmp_path / "sdxl"
    shutil.copytree(parts.sdxl, folder)
    open_folder(folder)
    spoil(folder)
    with pytest.raises(Refusal, match=message):
        open_folder(folder)


@needs_diffusers
def test_folders_and_weights_that_cannot_be_read(parts, tmp_path):
    with pytest.raises(Refusal, match=r"C-PATH.*--model_name_or_path"):
        open_folder(tmp_path / "none")
    with pytest.raises(Refusal, match=r"K-MISSING.*--vae"):
        open_folder(parts.sdxl, tmp_path)
    assert open_folder(parts.sdxl, parts.sdxl).vae_folder == open_folder(parts.sdxl).vae_folder
    folder = tmp_path / "sdxl"
    shutil.copytree(parts.sdxl, folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Refusal, match=r"K-DAMAGED.*vae"):
        open_folder(folder).vae()
    changed("unet", cross_attention_dim=32)(folder)
    with pytest.raises(Refusal, match=r"K-(KEYS|DAMAGED).*unet"):
        open_folder(folder).unet(torch.float32)


@needs_diffusers
def test_embeddings_are_the_pipelines(parts):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(parts.sdxl, local_files_only=True)
    expected, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    found = embed_prompt(open_folder(parts.sdxl), PROMPT, torch.device("cpu"))
    assert torch.allclose(found["embeds"], expected[0], atol=1e-6) and found["embeds"].shape == (77, 64)
    assert torch.allclose(found["pooled"], pooled[0], atol=1e-6)


@needs_diffusers
def test_a_prompt_that_would_be_cut_off(parts):
    with pytest.raises(Refusal, match=r"D-PROMPT.*shorten it"):
        prompt_ids(open_folder(parts.sdxl), "a long prompt " * 20)


@needs_diffusers
def test_what_is_computed_once_is_found_again(parts, tmp_path, monkeypatch):
    folder = open_folder(parts.sdxl)
    pictures = {"subject": find_pictures(str(parts.pictures), "--image_folder")[0]}

    def encoded(**changes):
        data = SubjectSettings(str(parts.pictures), PROMPT, **{"resolution": 64, "data_cache": str(tmp_path)} | changes)
        return encode_once(folder, data, pictures, 0, torch.device("cpu"))

    first = encoded()
    (file,) = tmp_path.iterdir()
    latent = folder.vae().encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    assert first["subject.mean"].shape == (5, *latent.shape[1:]) and (first["subject.std"] > 0).all()
    monkeypatch.setattr(parts_module.SdxlFolder, "vae", lambda self: pytest.fail("computed again"))
    again = encoded()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    monkeypatch.undo()
    other = encoded(center_crop=True)
    assert not torch.equal(other["subject.mean"], first["subject.mean"])
    assert len(list(tmp_path.iterdir())) == 2
    file.write_bytes(b"damaged")  # computed again, and written again
    assert all(torch.equal(first[name], encoded()[name]) for name in first) and file.stat().st_size > 1000


@needs_diffusers
def test_a_data_cache_that_is_a_file(parts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match=r"E-DISK\] .*file:--data_cache: the data cache cannot be used; found File"):
        pictures_of(parts, tmp_path / "file")
