"""Precomputes the VAE's latents and the text encoders' embeddings of pictures and prompts, cached on disk.

The pictures, their crops and the prompts are the same at every step, so VAE and text encoders are needed only once,
and their memory is free in training. The latent is sampled at every step, from the mean and the deviation here.

Shapes: N pictures, S side in pixels, H = W = S/8 side of a latent, T tokens of a prompt (77), D width of both text
encoders together (SDXL: 2,048), P width of the second one's projection (1,280).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from llava_moslora.diffusion.parts import TOKENIZERS, SdxlFolder
from llava_moslora.diffusion.subjects import Picture, load_square
from llava_moslora.distributed import from_rank_0, rank
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import replace_file
from llava_moslora.files.tensors import read_tensor_file
from llava_moslora.sdxl_settings import SubjectSettings

VERSION = 1  # of what is computed


def encode_once(
    folder: SdxlFolder,
    settings: SubjectSettings,
    pictures: dict[str, list[Picture]],
    seed: int,
    device: torch.device,
    embed: bool = True,
) -> dict[str, Tensor]:
    """Latents and embeddings, from ``--data_cache`` or computed by rank 0 and kept there. Collective.

    Args:
        pictures: those of the ``subject``, and with prior preservation those of its ``class``.
        embed: also the prompts; False where the text encoders are trained: then their ids.

    Returns:
        For ``subject`` and ``class``: ``NAME.mean`` and ``NAME.std`` float32[N, 4, H, W], ``NAME.time_ids``
        float32[N, 6], ``NAME.embeds`` float32[T, D] and ``NAME.pooled`` float32[P], or ``NAME.ids.ENCODER`` int64[T].

    Raises:
        Refusal: on every rank: I-..., a picture; D-PROMPT, a prompt that is too long; K-..., a part that cannot be
            loaded; D-NONFINITE, the VAE gave no finite latent.
    """
    found: dict[str, Tensor] | Refusal | None = None
    if rank() == 0:
        try:
            found = _from_cache(folder, settings, pictures, seed, device, embed)
            for name, prompt in ({} if embed else prompts_of(settings, pictures)).items():
                found |= {f"{name}.ids.{part}": ids for part, ids in prompt_ids(folder, prompt).items()}
        except Refusal as refusal:
            found = refusal
    found = from_rank_0(found)
    if isinstance(found, Refusal):
        raise found
    assert found is not None
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory of VAE and text encoders
    return found


def prompts_of(settings: SubjectSettings, pictures: dict[str, list[Picture]]) -> dict[str, str]:
    """The prompt of each set of pictures."""
    prompts = {"subject": settings.prompt, "class": settings.class_prompt or ""}
    return {name: prompts[name] for name in pictures}


def _from_cache(
    folder: SdxlFolder, settings: SubjectSettings, pictures: dict[str, list[Picture]], seed: int, device: torch.device,
    embed: bool,
) -> dict[str, Tensor]:  # fmt: skip
    prompts = prompts_of(settings, pictures)
    fingerprints = folder.fingerprints()
    decides = {
        "version": VERSION,
        "pictures": {name: [picture.content for picture in some] for name, some in pictures.items()},
        "crop": [settings.resolution, settings.resampling, settings.center_crop, seed],
        "vae": fingerprints["vae"],
        "text": [prompts, fingerprints["text_encoder"], fingerprints["text_encoder_2"]] if embed else None,
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    file = Path(settings.data_cache) / f"sdxl-{key}.safetensors"
    if file.is_file():
        try:
            return {name: tensor.read() for name, tensor in read_tensor_file(file).items()}
        except Refusal as refusal:
            print(f"recomputing: {refusal.line()}", flush=True)
    tensors = encode_pictures(folder, settings, pictures, seed, device)
    if embed:
        for name in pictures:
            tensors |= {f"{name}.{key}": value for key, value in embed_prompt(folder, prompts[name], device).items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, save(tensors))
    except OSError as error:
        raise Refusal(
            "E-DISK", "the data cache cannot be used", file=error.filename or file.parent, key="--data_cache",
            found=error.strerror or error, expected="a folder that can be written, with space",
            fix="free space, correct its permissions, or name another folder",
        ) from error  # fmt: skip
    return tensors


@torch.no_grad()
def encode_pictures(
    folder: SdxlFolder, settings: SubjectSettings, pictures: dict[str, list[Picture]], seed: int, device: torch.device
) -> dict[str, Tensor]:
    """``NAME.mean``, ``NAME.std`` and ``NAME.time_ids``, as :func:`encode_once`."""
    squares = {name: [load_square(picture, settings, seed) for picture in some] for name, some in pictures.items()}
    vae = folder.vae().to(device)
    tensors = {}
    for name, some in squares.items():
        found = [vae.encode(square.pixels[None].to(device)).latent_dist for square in some]
        tensors[f"{name}.mean"] = torch.cat([latent.mean for latent in found]).cpu()
        tensors[f"{name}.std"] = torch.cat([latent.std for latent in found]).cpu()
        tensors[f"{name}.time_ids"] = torch.stack([square.time_ids for square in some])
        for picture, mean, std in zip(pictures[name], tensors[f"{name}.mean"], tensors[f"{name}.std"], strict=True):
            if not (mean.isfinite().all() and std.isfinite().all()):
                raise Refusal(
                    "D-NONFINITE", "the VAE's latent of this picture is not finite", file=picture.folder / picture.name,
                    fix="another VAE: --vae",
                )  # fmt: skip
    return tensors


def embed_prompt(folder: SdxlFolder, prompt: str, device: torch.device) -> dict[str, Tensor]:
    """``embeds`` float32[T, D] and ``pooled`` float32[P], computed in float32.

    Raises:
        Refusal: D-PROMPT, the prompt is too long.
    """
    ids = prompt_ids(folder, prompt)
    encoders = {part: folder.text_encoder(part, torch.float32).to(device) for part in TOKENIZERS}
    with torch.no_grad():
        embeds, pooled = text_embeddings(encoders, {part: some[None].to(device) for part, some in ids.items()})
    return {"embeds": embeds[0].cpu(), "pooled": pooled[0].cpu()}


def prompt_ids(folder: SdxlFolder, prompt: str) -> dict[str, Tensor]:
    """Encoder → int64[T].

    Raises:
        Refusal: D-PROMPT, more tokens than an encoder takes: diffusers would cut the prompt off.
    """
    ids = {}
    for part in TOKENIZERS:
        tokenizer = folder.tokenizer(part)
        length = tokenizer.model_max_length
        words = tokenizer(prompt, verbose=False).input_ids  # its length is refused here
        if len(words) > length:
            raise Refusal(
                "D-PROMPT", "the prompt is too long, and would be truncated", key="--prompt",
                found=f"{len(words)} tokens", expected=f"at most {length}, two of them around the prompt",
                fix="shorten it",
            )  # fmt: skip
        padded = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt")
        ids[part] = padded.input_ids[0]
    return ids


def text_embeddings(encoders: dict[str, nn.Module], ids: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """SDXL's prompt conditioning: float[B, T, D], the penultimate hidden states of both encoders, concatenated, and
    float[B, P], the second one's projected state (SDXL, Podell et al. 2023, section 2.1).

    Args:
        ids: encoder → int64[B, T].
    """
    found = {part: encoder(ids[part], output_hidden_states=True) for part, encoder in encoders.items()}
    embeds = torch.cat([output.hidden_states[-2] for output in found.values()], dim=-1)
    return embeds, found["text_encoder_2"].text_embeds
