"""A tiny random Stable Diffusion XL, made in code: every kind of layer that the real one has, few of each."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed: pip install -e '.[diffusion]'"
)
PROMPT, SEED = "a photo of ikat cat", 42
# Of UNet2DConditionModel, as stabilityai/stable-diffusion-xl-base-1.0's unet/config.json has it
REAL_UNET = {
    "act_fn": "silu", "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "in_channels": 4,
    "layers_per_block": 2, "out_channels": 4, "projection_class_embeddings_input_dim": 2816, "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
}  # fmt: skip
TINY_UNET = REAL_UNET | {
    "addition_time_embed_dim": 8, "attention_head_dim": [2, 4], "block_out_channels": [32, 64],
    "cross_attention_dim": 64, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 1,
    "projection_class_embeddings_input_dim": 80, "sample_size": 8, "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
# For the warm server: all that scripts/train_sdxl.py imports, also late
IMPORTS = (
    "diffusers", "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers.scheduling_ddpm", "train_sdxl",
)  # fmt: skip
STATE = ("adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json")
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1,
    "timestep_spacing": "leading", "use_karras_sigmas": False,
}  # fmt: skip


def write_sdxl(folder: Path) -> Path:
    """A complete pipeline folder with random weights."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    state = torch.get_rng_state()
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / ".tokenizer")
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3,
        "max_position_embeddings": 77, "vocab_size": len(tokenizer), "projection_dim": 32,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = CLIPTextConfig(**sizes)
    vae = AutoencoderKL(
        block_out_channels=[32, 64, 64, 64], down_block_types=["DownEncoderBlock2D"] * 4, latent_channels=4,
        layers_per_block=1, scaling_factor=0.13025, up_block_types=["UpDecoderBlock2D"] * 4, sample_size=64,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=UNet2DConditionModel(**TINY_UNET),
        scheduler=EulerDiscreteScheduler(**{k: v for k, v in SCHEDULER.items() if k != "_class_name"}),
    ).save_pretrained(folder)  # fmt: skip
    torch.set_rng_state(state)
    return folder


def tiny_tokenizer(folder: Path):
    """CLIP's tokenizer over letters, with a merge for nothing: any prompt has ids."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77,
    )  # fmt: skip


def write_pictures(folder: Path, count: int = 5, size: int = 80) -> Path:
    """Random pictures of different shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (size + 8 * number, size + 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def flags(parts, output: Path, **changes) -> list[str]:
    """The command line of scripts/train_sdxl.py for the tiny model."""
    settings = {
        "model_name_or_path": parts.sdxl, "image_folder": parts.pictures, "prompt": PROMPT,
        "resolution": 64, "data_cache": output.parent / "cache", "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2,
        "output_dir": output, "report_to": "none",
    } | changes  # fmt: skip
    return [str(word) for name, value in settings.items() if value is not None for word in (f"--{name}", value)]


def train(parts, output: Path, **changes) -> None:
    """The script's ``main``, in this process and without DeepSpeed."""
    from llava_moslora.training.callbacks.preemption import SIGNALS
    from scripts.train_sdxl import main

    arguments, handlers = sys.argv, {number: signal.getsignal(number) for number in SIGNALS}
    sys.argv = ["scripts/train_sdxl.py", *flags(parts, output, **changes)]
    try:
        main()
    finally:
        sys.argv = arguments
        for number, handler in handlers.items():
            signal.signal(number, handler)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def pictures_of(parts, cache: Path, **settings):
    """The data set that the script makes, and the model's folder."""
    from llava_moslora.diffusion.batches import CLASS, SUBJECT, Pictures
    from llava_moslora.diffusion.encode import encode_once
    from llava_moslora.diffusion.parts import open_folder
    from llava_moslora.diffusion.subjects import find_pictures
    from llava_moslora.sdxl_settings import SubjectSettings

    folder = open_folder(parts.sdxl)
    data = SubjectSettings(str(parts.pictures), PROMPT, resolution=64, data_cache=str(cache), **settings)
    sets = {SUBJECT: find_pictures(str(parts.pictures), "--image_folder")[0]}
    if data.class_image_folder:
        sets[CLASS] = find_pictures(data.class_image_folder, "--class_image_folder")[0]
    encoded = encode_once(folder, data, sets, SEED, torch.device("cpu"))
    return Pictures(sets[SUBJECT], encoded, SEED, 1000), folder


def plain_loss(unet, batch: dict, scheduler) -> torch.Tensor:
    """Diffusers' loss, written out: the mean squared error of the predicted noise."""
    latents = (batch["mean"] + batch["std"] * batch["latent_noise"]) * 0.13025
    share = scheduler.alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    noisy = share.sqrt() * latents + (1 - share).sqrt() * batch["noise"]
    conditions = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    predicted = unet(noisy, batch["timesteps"], batch["embeds"], added_cond_kwargs=conditions).sample
    return ((predicted - batch["noise"]) ** 2).mean()


def plain_losses(parts, cache: Path, adapt, steps: int, accumulation: int = 4, rate: float = 1e-2) -> list[float]:
    """The losses of a plain loop: torch's AdamW over the adapters that ``adapt(unet)`` puts into the UNet.

    A step's global batch is computed at once; its order is the sampler's.
    """
    from diffusers import UNet2DConditionModel

    dataset, folder = pictures_of(parts, cache)
    unet = UNet2DConditionModel.from_pretrained(parts.sdxl / "unet").requires_grad_(False)
    torch.manual_seed(SEED)
    adapt(unet)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    sampler, found = dataset.sampler(per_device_batch_size=accumulation, seed=SEED), []
    for step, records in zip(range(steps), sampler, strict=False):
        loss = plain_loss(unet, dataset.complete(records, step, range(accumulation)), folder.scheduler())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found
