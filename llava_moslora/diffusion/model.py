"""Stable Diffusion XL in training: the UNet, its loss, and MoSLoRA adapters in its attention.

Shapes: B pictures (with prior preservation half of them the class's), H and W of a latent, T, D, P as in ``encode.py``.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.diffusion.encode import text_embeddings
from llava_moslora.diffusion.parts import TOKENIZERS, SdxlFolder
from llava_moslora.errors import Refusal
from llava_moslora.models.names import ADAPTER_NAME
from llava_moslora.sdxl_settings import SdxlAdapterSettings

# Part → the linear layers of every attention in it, as in diffusers' own script
TARGETS = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    **dict.fromkeys(TOKENIZERS, ("q_proj", "k_proj", "v_proj", "out_proj")),
}


class Sdxl(nn.Module):
    """The UNet, and the text encoders where they are trained too, under one forward that returns the loss.

    Args:
        scheduler: diffusers' ``DDPMScheduler``: how noise is added, and what is predicted.
        latent_scale: the VAE's ``scaling_factor``.
        snr_gamma: γ of min-SNR weights (Hang et al. 2023, equation 4); None: all timesteps count the same.
        prior_loss_weight: None where there are no class pictures.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the micro-batch

    def __init__(
        self,
        unet: nn.Module,
        text_encoders: dict[str, nn.Module],
        scheduler: Any,
        *,
        latent_scale: float,
        snr_gamma: float | None = None,
        prior_loss_weight: float | None = None,
    ):
        super().__init__()
        self.unet = unet
        for part, encoder in text_encoders.items():
            self.add_module(part, encoder)
        self.trained_encoders = list(text_encoders)
        self.scheduler, self.latent_scale = scheduler, latent_scale
        self.snr_gamma, self.prior_loss_weight = snr_gamma, prior_loss_weight

    def forward(
        self, mean: Tensor, std: Tensor, latent_noise: Tensor, noise: Tensor, timesteps: Tensor, time_ids: Tensor,
        embeds: Tensor | None = None, pooled: Tensor | None = None, **ids: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """
        Args:
            mean, std, latent_noise, noise: float32[B, 4, H, W]. timesteps: int64[B]. time_ids: float32[B, 6].
            embeds: float32[B, T, D]. pooled: float32[B, P].
            ids: in place of these two, where the text encoders are trained: ``ids.ENCODER`` int64[B, T].

        Returns:
            ``loss``: float32[].
        """
        latents = (mean + std * latent_noise) * self.latent_scale
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if embeds is None or pooled is None:
            encoders = {part: getattr(self, part) for part in self.trained_encoders}
            embeds, pooled = text_embeddings(encoders, {part: ids[f"ids.{part}"] for part in encoders})
        predicted = self.predict(noisy, timesteps, embeds, pooled, time_ids)
        is_velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
        errors = F.mse_loss(predicted.float(), target, reduction="none").flatten(1).mean(1)  # (B)
        if self.snr_gamma is not None:
            errors = errors * self.snr_weights(timesteps)
        if self.prior_loss_weight is None:
            return {"loss": errors.mean()}
        subject, prior = errors.chunk(2)
        return {"loss": subject.mean() + self.prior_loss_weight * prior.mean()}

    def predict(self, noisy: Tensor, timesteps: Tensor, embeds: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """The UNet's prediction, float[B, 4, H, W]; all in the UNet's dtype but the sizes, whose digits bf16 rounds."""
        dtype = self.unet.dtype
        noisy, embeds = noisy.to(dtype), embeds.to(dtype)
        if self.training and is_deepspeed_zero3_enabled():
            # ZeRO-3 frees an adapted layer's weights by a backward hook on its inputs. On inputs without a gradient
            # torch fires that hook before the layer's backward instead of after it.
            noisy.requires_grad_(), embeds.requires_grad_()
        conditions = {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
        return self.unet(noisy, timesteps, embeds, added_cond_kwargs=conditions, return_dict=False)[0]

    def snr_weights(self, timesteps: Tensor) -> Tensor:
        """float32[B]: min(SNR, γ) / SNR for a predicted noise, min(SNR, γ) / (SNR + 1) for a predicted velocity."""
        signal = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = signal / (1 - signal)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        return snr.clamp(max=self.snr_gamma) / (snr + velocity)


def build_model(
    folder: SdxlFolder, settings: SdxlAdapterSettings, dtype: torch.dtype, *, preserves_prior: bool = False
) -> Sdxl:
    """The frozen model without adapters.

    Raises:
        Refusal: K-MODEL, an unsupported prediction type; K-..., weights that cannot be loaded.
    """
    scheduler = folder.scheduler()
    if (kind := scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
        what, expected = "unsupported prediction type", "epsilon | v_prediction"
        raise Refusal("K-MODEL", what, file=folder.root / "scheduler", key="prediction_type", found=kind,
                      expected=expected, fix="give a Stable Diffusion XL")  # fmt: skip
    encoders = {part: folder.text_encoder(part, dtype) for part in TOKENIZERS} if settings.train_text_encoder else {}
    return Sdxl(
        folder.unet(dtype), encoders, scheduler, latent_scale=folder.latent_scale(), snr_gamma=settings.snr_gamma,
        prior_loss_weight=settings.prior_loss_weight if preserves_prior else None,
    )  # fmt: skip


def add_adapters(model: Sdxl, settings: SdxlAdapterSettings) -> PeftModel:
    """One MoSLoRA adapter over all parts. Trained tensors get the model's dtype, as ZeRO-3 demands.

    Raises:
        Refusal: C-RANK, a rank above a layer's smaller dimension; whatever :class:`MosLoraConfig` refuses.
    """
    parts = [part for part in TARGETS if part == "unet" or part in model.trained_encoders]
    names = {part: "|".join(map(re.escape, TARGETS[part])) for part in parts}
    regex = "|".join(rf"{part}\..*\.(?:{names[part]})" for part in parts)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(regex, name):
            smaller = min(module.in_features, module.out_features)
            if settings.lora_r > smaller:
                raise Refusal(
                    "C-RANK", f"the rank is above a dimension of {name}", key="--lora_r", found=settings.lora_r,
                    expected=f"at most {smaller}", fix="lower it",
                )  # fmt: skip
    config = MosLoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        init_lora_weights="gaussian" if settings.init_lora_weights == "gaussian" else True,
        mixer_init=settings.mixer_init,
        train_mixer=settings.train_mixer,
        target_modules=regex,
    )
    return get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)


def set_recompute(model: PeftModel, mode: str) -> None:
    """``full``: backward recomputes every block of the UNet and every layer of trained text encoders."""
    if mode == "none":
        return
    inner = model.get_base_model()
    inner.unet.enable_gradient_checkpointing()
    for part in inner.trained_encoders:
        getattr(inner, part).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
