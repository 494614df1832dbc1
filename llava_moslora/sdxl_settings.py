"""The settings of ``scripts/train_sdxl.py``: each field is a flag of its name, as in :mod:`llava_moslora.config`.

Neither torch nor diffusers is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava_moslora.config import ADAPTERS, DATA, MIXER_INITS, MODEL, TRAINING, Settings, setting

RESAMPLING = ("bilinear", "lanczos")
# Init of lora_A: normal with variance 1/r, as the paper's authors did, or PEFT's default
A_INITS = ("gaussian", "kaiming_uniform")


@dataclass
class SdxlSettings(Settings):
    """The frozen model."""

    heading = MODEL

    model_name_or_path: str = setting(help="folder of a Stable Diffusion XL in diffusers' layout")
    vae: str | None = setting(None, "folder of another VAE, such as sdxl-vae-fp16-fix; default: the model's own")


@dataclass
class SubjectSettings(Settings):
    """The pictures of a subject, their prompt, and what is computed of them once."""

    heading = DATA

    image_folder: str = setting(help="folder with the pictures of the subject, a few of them")
    prompt: str = setting(help='prompt of all pictures, with a rare word for the subject: "a photo of ikat cat"')
    resolution: int = setting(1024, "side of the square that is trained, in pixels; a multiple of the VAE's 8")
    resampling: str = setting("bilinear", "how pictures are resized: bilinear | lanczos", RESAMPLING)
    center_crop: bool = setting(False, "crop the middle; default: a random crop, the same at every step")
    class_image_folder: str | None = setting(None, "prior preservation: pictures of the subject's class")
    class_prompt: str | None = setting(None, 'prior preservation: their prompt: "a photo of cat"')
    follow_image_links: bool = setting(False, "allow links that lead out of the image folder")
    data_cache: str = setting(".cache/llava_moslora", "cache folder for latents and text embeddings")


@dataclass
class SdxlAdapterSettings(Settings):
    """What is trained, and its loss. Defaults are the reference's of the paper's section 4.3."""

    heading = ADAPTERS

    lora_r: int = setting(4, "rank")
    lora_alpha: float = setting(4, "scaling = alpha / rank")
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    init_lora_weights: str = setting("gaussian", "init of A: gaussian | kaiming_uniform", A_INITS)
    mixer_init: str = setting("orthogonal", " | ".join(MIXER_INITS), MIXER_INITS)
    train_mixer: bool = setting(True, "False: freeze the mixers; with identity that is LoRA")
    train_text_encoder: bool = setting(False, "adapters in both text encoders too")
    snr_gamma: float | None = setting(None, "min-SNR weighting of the loss; 5 is usual", group=TRAINING)
    prior_loss_weight: float = setting(1.0, "weight of the class pictures' loss", group=TRAINING)

    @property
    def uses_dropout(self) -> bool:
        """Whether the adapters drop anything."""
        return self.lora_dropout > 0
