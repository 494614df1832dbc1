"""The base model of benchmarks/subject.py: a small Stable Diffusion XL with every component, trained on EasyVQA.

Text encoders are random and frozen: they tell words apart, and the UNet learns what the words mean. The VAE sees
drawings whose figures have any colour, the UNet only the eight colours of the set, with their captions. The loss is the
package's own (:class:`llava_moslora.diffusion.model.Sdxl`); only this training of all weights is a loop of its own.

Shapes: B drawings of a batch, S = 16 pixels of a side, H = S/2 of a latent.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from diffusers import UNet2DConditionModel as UNet
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from llava_moslora.diffusion.encode import text_embeddings
from llava_moslora.diffusion.model import Sdxl

SIDE, LATENT, TOKENS, SMALLEST = 16, 8, 8, 7
APART = 60  # of a figure's pixels from the background, of 255
VAE_STEPS, VAE_BATCH, VAE_RATE = 600, 32, 2e-3
UNET_STEPS, UNET_BATCH, UNET_RATE, WITHOUT_CAPTION, AVERAGE = 900, 32, 1e-3, 0.1, 0.99
FIGURE_WEIGHT = 8  # of a figure's pixels in the VAE's loss: most of a drawing is background
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
}  # fmt: skip
UNET: dict[str, Any] = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "attention_head_dim": [2, 4],
    "block_out_channels": [32, 64], "cross_attention_dim": 128, "in_channels": 4, "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 1, "norm_num_groups": 16,
    "projection_class_embeddings_input_dim": 64 + 6 * 8, "sample_size": LATENT, "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "use_linear_projection": True,
}  # fmt: skip


@dataclass(frozen=True)
class Drawings:
    """``pixels`` uint8[N, S, S, 3], the figure's part of each pixel ``alpha`` float32[N, S, S], and ``captions``."""

    pixels: np.ndarray
    alpha: np.ndarray
    captions: list[str]

    def recoloured(self, number: int, colour: Sequence[float]) -> Image.Image:
        """The same drawing with another colour of its figure."""
        alpha, background = self.alpha[number][..., None], background_of(self.pixels[number])
        mixed = alpha * np.array(colour) + (1 - alpha) * background
        return Image.fromarray(np.clip(np.round(mixed), 0, 255).astype(np.uint8))


def background_of(pixels: np.ndarray) -> np.ndarray:
    """The most frequent colour along the edges, float64[3]: a large figure has more pixels than its background."""
    edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    return np.median(np.concatenate(edges), axis=0)


def read_drawings(data: Path) -> Drawings:
    """EasyVQA's training drawings with a settled caption: a square of 32 pixels with the whole figure somewhere in it,
    at half the size. Drawings of a tiny figure, or of one at the edge, are left out."""
    pixels, alphas, captions = [], [], []
    places = np.random.default_rng(0)
    for record in json.loads((data / "captions.json").read_text(encoding="utf-8")):
        with Image.open(data / "images" / record["image"]) as image:
            corner = window(np.asarray(image.convert("RGB")), places)
            if corner is None:
                continue
            square = image.convert("RGB").crop((*corner, corner[0] + 2 * SIDE, corner[1] + 2 * SIDE))
            one = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BOX))
        background = background_of(one)
        along = np.median(one[far_from(one, background)], axis=0) - background
        pixels.append(one)
        alphas.append(np.clip((one - background) @ along / (along @ along), 0, 1))
        captions.append(record["conversations"][1]["value"])
    return Drawings(np.stack(pixels), np.stack(alphas).astype(np.float32), captions)


def far_from(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    return np.abs(pixels - background).max(axis=-1) > APART


def window(pixels: np.ndarray, places: np.random.Generator) -> tuple[int, int] | None:
    """Left and top of a square of 2 S pixels around the figure; None where the figure is too small or too large, or at
    the edge of the drawing."""
    rows, columns = (np.flatnonzero(far_from(pixels, background_of(pixels)).any(axis)) for axis in (1, 0))
    sizes = [some[-1] - some[0] + 1 if len(some) else 0 for some in (columns, rows)]
    at_edge = any(some[0] == 0 or some[-1] == len(pixels) - 1 for some in (columns, rows) if len(some))
    if at_edge or not 2 * SMALLEST <= min(sizes) <= max(sizes) <= 2 * SIDE - 4:
        return None
    corner = []
    for some, size in zip((columns, rows), sizes, strict=True):
        last = len(pixels) - 2 * SIDE  # the figure keeps two pixels from the square's edges, but for the drawing's own
        least, most = (min(max(at, 0), last) for at in (some[0] + size + 2 - 2 * SIDE, some[0] - 2))
        corner.append(int(places.integers(least, most + 1)))
    return corner[0], corner[1]


def make_vae(drawings: Drawings, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Train the VAE and write it into ``folder``; returns what it took."""
    start = time.process_time()
    torch.manual_seed(seed)
    vae, error = train_vae(drawings, torch.Generator().manual_seed(seed))
    vae.save_pretrained(folder)
    return {"parameters": count(vae), "error": error, "cpu_seconds": round(time.process_time() - start, 1)}


def make_base(drawings: Drawings, vae_folder: Path, folder: Path, seed: int = 1) -> dict[str, Any]:
    """Train the UNet on the VAE's latents, and write the pipeline into ``folder``; returns what it took."""
    start = time.process_time()
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(vae_folder, local_files_only=True).requires_grad_(False).eval()
    tokenizer = make_tokenizer(folder.with_name(f"{folder.name}-vocabulary"), drawings.captions)
    encoders = make_text_encoders(tokenizer)
    unet, losses = train_unet(drawings, vae, tokenizer, encoders, torch.Generator().manual_seed(seed))
    StableDiffusionXLPipeline(
        vae=vae, **encoders, tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1, timestep_spacing="leading"),
    ).save_pretrained(folder)  # fmt: skip
    return {
        "drawings": len(drawings.captions), "parameters": count(unet), "loss": float(np.mean(losses[-200:])),
        "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def rate_at(step: int, steps: int, rate: float) -> float:
    """Up in 50 steps, then down along a cosine."""
    return rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def train_vae(drawings: Drawings, generator: torch.Generator) -> tuple[AutoencoderKL, float]:
    """On figures of any colour before any pale background; the mean squared error over the last 50 steps, of 1."""
    vae = AutoencoderKL(
        block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
        layers_per_block=1, norm_num_groups=8, sample_size=SIDE, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    with torch.no_grad():  # the latents' deviations start small: with 1 little could be learned at first
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-6.0)
    alphas = torch.from_numpy(drawings.alpha)[:, None]  # (N, 1, S, S)
    optimizer, errors = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=0.0), []
    for step in range(VAE_STEPS):
        alpha = alphas[torch.randint(len(alphas), (VAE_BATCH,), generator=generator)]
        colour, background = (torch.rand(VAE_BATCH, 3, 1, 1, generator=generator) * 2 - 1 for _ in range(2))
        drawn = alpha * colour + (1 - alpha) * (0.875 + 0.125 * background)  # (B, 3, S, S) in -1..1
        latent = vae.encode(drawn).latent_dist
        again = vae.decode(latent.sample(generator)).sample
        squares = (again - drawn) ** 2
        loss = (squares * (1 + FIGURE_WEIGHT * alpha)).mean() + 1e-8 * latent.kl().mean()
        take_step(optimizer, loss, rate_at(step, VAE_STEPS, VAE_RATE))
        errors.append(float(squares.detach().mean()) / 4)
        if step % 100 == 99:
            print(f"VAE step {step + 1}: error {np.mean(errors[-50:]):.5f}", flush=True)
    vae.requires_grad_(False).eval()
    means, _ = encode(vae, drawings)
    vae.register_to_config(scaling_factor=1 / float(means.std()))
    return vae, float(np.mean(errors[-50:]))


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


@torch.no_grad()
def encode(vae: AutoencoderKL, drawings: Drawings) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every drawing's latent, float32[N, 4, H, H] each."""
    pixels = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2)
    found = [vae.encode(some.float() / 127.5 - 1).latent_dist for some in pixels.split(64)]
    return torch.cat([one.mean for one in found]), torch.cat([one.std for one in found])


def make_tokenizer(folder: Path, captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP's, over letters and the words of the captions: ``ikat`` is four letters, as SDXL has two pieces for it."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    tokenizer = CLIPTokenizer(**files, model_max_length=TOKENS)
    tokenizer.add_tokens(sorted({word for caption in captions for word in caption.split() if len(word) > 1}))
    return tokenizer


def make_text_encoders(tokenizer: CLIPTokenizer) -> dict[str, nn.Module]:
    config = CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=2, projection_dim=64,
        max_position_embeddings=TOKENS, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoders = {"text_encoder": CLIPTextModel(config), "text_encoder_2": CLIPTextModelWithProjection(config)}
    return {part: encoder.requires_grad_(False).eval() for part, encoder in encoders.items()}


def train_unet(
    drawings: Drawings, vae: AutoencoderKL, tokenizer: CLIPTokenizer, encoders: dict[str, nn.Module],
    generator: torch.Generator,
) -> tuple[UNet, list[float]]:  # fmt: skip
    """On captioned drawings, a tenth of them without a caption, for guidance; the running average of the weights."""
    means, stds = encode(vae, drawings)
    captions = sorted(set(drawings.captions))
    ids = tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds, pooled = text_embeddings(encoders, dict.fromkeys(encoders, ids))
    # Stable Diffusion XL's embedding of no caption is zero
    embeds, pooled = (torch.cat([some, torch.zeros_like(some[:1])]) for some in (embeds, pooled))
    caption = torch.tensor([captions.index(one) for one in drawings.captions])
    unet = UNet(**UNET)
    model = Sdxl(unet, {}, DDPMScheduler(**SCHEDULE), latent_scale=vae.config.scaling_factor)
    average, losses = copy.deepcopy(unet).requires_grad_(False), []
    optimizer = torch.optim.AdamW(unet.parameters(), lr=UNET_RATE, weight_decay=1e-4)
    sizes = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE], dtype=torch.float32).expand(UNET_BATCH, 6)
    for step in range(UNET_STEPS):
        chosen = torch.randint(len(means), (UNET_BATCH,), generator=generator)
        without = torch.rand(UNET_BATCH, generator=generator) < WITHOUT_CAPTION
        said = torch.where(without, len(captions), caption[chosen])
        latent_noise, noise = (torch.randn(means[chosen].shape, generator=generator) for _ in range(2))
        timesteps = torch.randint(1000, (UNET_BATCH,), generator=generator)
        loss = model(
            mean=means[chosen], std=stds[chosen], latent_noise=latent_noise, noise=noise, timesteps=timesteps,
            time_ids=sizes, embeds=embeds[said], pooled=pooled[said],
        )["loss"]  # fmt: skip
        take_step(optimizer, loss, rate_at(step, UNET_STEPS, UNET_RATE))
        losses.append(loss.item())
        with torch.no_grad():
            share = 1 - min(AVERAGE, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), share)
        if step % 100 == 99:
            print(f"UNet step {step + 1}: loss {np.mean(losses[-100:]):.4f}", flush=True)
    return average.eval(), losses
