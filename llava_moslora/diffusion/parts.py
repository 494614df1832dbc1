"""The parts of a Stable Diffusion XL folder in diffusers' layout, checked before any weight is read.

diffusers is an optional package: whatever needs it is imported in functions, after :func:`require_diffusers`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_moslora.errors import Refusal, few
from llava_moslora.files.disk import read_json
from llava_moslora.files.tensors import INDEX
from llava_moslora.noise import collected_reports
from llava_moslora.runs.fingerprint import fingerprint

# Folder of a part → key of its config.json and the value that SDXL's has
CLASSES = {
    "unet": ("_class_name", "UNet2DConditionModel"),
    "vae": ("_class_name", "AutoencoderKL"),
    "text_encoder": ("architectures", "CLIPTextModel"),
    "text_encoder_2": ("architectures", "CLIPTextModelWithProjection"),
}
WEIGHTS = {
    **dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model"),
    **dict.fromkeys(("text_encoder", "text_encoder_2"), "model"),
}
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
SCHEDULER = "scheduler/scheduler_config.json"
EXPECTED = "the folder of a Stable Diffusion XL in diffusers' layout: " + ", ".join([*CLASSES, *TOKENIZERS.values()])
FIX = "download all folders of the model; one file of weights (…safetensors) is converted by diffusers' scripts"


def require_diffusers() -> None:
    """
    Raises:
        Refusal: E-MISSING, diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        fix = "pip install 'llava_moslora[diffusion]'"
        raise Refusal("E-MISSING", "needs diffusers, which is not installed", key="scripts/train_sdxl.py", fix=fix)


@contextmanager
def whole_weights(deepspeed: Any) -> Iterator[None]:
    """Disables ZeRO-3 partitioning while parts are loaded: transformers would run collectives in which ranks that do
    not load them take no part. DeepSpeed partitions the trained model when it starts.

    Args:
        deepspeed: ``hf_deepspeed_config`` of transformers' ``TrainingArguments``; None without DeepSpeed.
    """
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if deepspeed is not None:
            set_hf_deepspeed_config(deepspeed)


@dataclass(frozen=True)
class SdxlFolder:
    """A Stable Diffusion XL on disk, checked to be complete (:func:`open_folder`).

    Attributes:
        root: the model's folder. vae_folder: the VAE's, of this model or of another one.
    """

    root: Path
    vae_folder: Path

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Of the parts, as every checkpoint's manifest records them."""
        parts = {part: fingerprint(self.root / part) for part in ("unet", "text_encoder", "text_encoder_2")}
        return parts | {"vae": fingerprint(self.vae_folder), "scheduler": fingerprint(self.root / "scheduler")}

    def latent_scale(self) -> float:
        """Scaling factor of latents; AutoencoderKL's default if config.json has none."""
        return float(read_json(self.vae_folder / "config.json").get("scaling_factor", 0.18215))

    def scheduler(self) -> Any:
        """The noise schedule of training, a ``DDPMScheduler``."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(read_json(self.root / SCHEDULER))

    def unet(self, dtype: torch.dtype) -> nn.Module:
        """Frozen."""
        from diffusers import UNet2DConditionModel

        return _loaded(UNet2DConditionModel, self.root / "unet", dtype)

    def vae(self) -> nn.Module:
        """In float32, frozen: in 16 bits SDXL's own VAE overflows."""
        from diffusers import AutoencoderKL

        return _loaded(AutoencoderKL, self.vae_folder, torch.float32)

    def text_encoder(self, part: str, dtype: torch.dtype) -> nn.Module:
        """``text_encoder`` or ``text_encoder_2``, frozen."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        return _loaded(classes[part], self.root / part, dtype)

    def tokenizer(self, part: str) -> Any:
        """Of ``text_encoder`` or ``text_encoder_2``."""
        from transformers import CLIPTokenizer

        folder = self.root / TOKENIZERS[part]
        try:
            return CLIPTokenizer.from_pretrained(folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            found = f"{type(error).__name__}: {error}"
            raise Refusal("K-MODEL", "not a CLIP tokenizer", file=folder, found=found, fix=FIX) from error


def open_folder(path: str | Path, vae: str | Path | None = None) -> SdxlFolder:
    """The model in ``path``; nothing but its configurations is read.

    Raises:
        Refusal: C-PATH, no such folder; K-MISSING, a part or its weights are missing; K-MODEL, a part is not SDXL's.
    """
    root = Path(path)
    if not root.is_dir():
        what, fix = ("a file, not a folder", FIX) if root.exists() else ("no such folder", "check the path")
        raise Refusal("C-PATH", what, file=root, key="--model_name_or_path", expected=EXPECTED, fix=fix)
    vae_folder = root / "vae"
    if vae is not None:
        vae_folder = Path(vae) if (Path(vae) / "config.json").is_file() else Path(vae) / "vae"
    for part in CLASSES:
        _check_part(part, vae_folder if part == "vae" else root / part, given=vae if part == "vae" else None)
    for file in (SCHEDULER, *(f"{name}/tokenizer_config.json" for name in TOKENIZERS.values())):
        if not (root / file).is_file():
            what = "a part of the model is missing"
            raise Refusal("K-MISSING", what, file=root / file, found=_content(root), expected=EXPECTED, fix=FIX)
    _check_unet(read_json(root / "unet" / "config.json"), root / "unet")
    config = read_json(vae_folder / "config.json")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        what, fix = "this VAE's latents are normalised differently from SDXL's", "SDXL's own, or sdxl-vae-fp16-fix"
        raise Refusal("K-MODEL", what, file=vae_folder, key="latents_mean", found=config.get("latents_mean"), fix=fix)
    return SdxlFolder(root, vae_folder)


def _check_part(part: str, folder: Path, given: object) -> None:
    flag = "--model_name_or_path" if given is None else "--vae"
    if not (folder / "config.json").is_file():
        place = folder.parent if given is None else folder
        raise Refusal(
            "K-MISSING", f"the part {part} is missing", file=folder, key=flag, found=_content(place),
            expected=EXPECTED if given is None else "a folder with an AutoencoderKL", fix=FIX,
        )  # fmt: skip
    key, expected = CLASSES[part]
    found = read_json(folder / "config.json").get(key)
    if expected not in (found if isinstance(found, list) else [found]):
        raise Refusal(
            "K-MODEL", f"the {part} is not a Stable Diffusion XL's", file=folder / "config.json", key=key, found=found,
            expected=expected, fix="give a Stable Diffusion XL" if given is None else "give a VAE of diffusers",
        )  # fmt: skip
    stems = [WEIGHTS[part] + suffix for suffix in (".safetensors", f".safetensors{INDEX}")]
    if not any((folder / name).is_file() for name in stems):
        what = f"no weights of the {part}"
        raise Refusal("K-MISSING", what, file=folder, found=_content(folder), expected=" or ".join(stems), fix=FIX)


def _check_unet(config: dict[str, Any], folder: Path) -> None:
    """A UNet of another Stable Diffusion has no sizes and crops among its inputs."""
    if config.get("addition_embed_type") != "text_time" or config.get("in_channels") != 4:
        raise Refusal(
            "K-MODEL", "the UNet is not a Stable Diffusion XL's", file=folder / "config.json",
            key="addition_embed_type, in_channels",
            found=f"{config.get('addition_embed_type')}, {config.get('in_channels')}", expected="text_time, 4",
            fix="give a Stable Diffusion XL: neither Stable Diffusion 1 or 2, nor an inpainting model or a refiner",
        )  # fmt: skip


def _loaded(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The weights of ``folder``, every one of them, as ``dtype``."""
    try:
        with collected_reports():  # what is missing is refused below
            module, info = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=dtype
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Refusal("K-DAMAGED", "the weights cannot be loaded", file=folder, found=found, fix=FIX) from error
    # transformers saves the encoders' positions in older versions; they are no weights
    lacking = [name for name in info["missing_keys"] if "position_ids" not in name]
    wrong = [*lacking, *map(str, info.get("mismatched_keys") or ())]
    if wrong:
        what = f"{len(wrong)} tensors are missing or of another shape"
        raise Refusal("K-KEYS", what, file=folder, key=few(wrong), fix=FIX)
    return module.requires_grad_(False).eval()


def _content(folder: Path) -> str:
    return few(sorted(p.name for p in folder.iterdir()), 6) if folder.is_dir() else "no such folder"
