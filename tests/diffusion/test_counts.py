"""Trained parameters of the real UNet, on the meta device."""

import pytest
import torch

from llava_moslora.diffusion.model import Sdxl, add_adapters
from llava_moslora.sdxl_settings import SdxlAdapterSettings
from support.sdxl import REAL_UNET, needs_diffusers

pytestmark = needs_diffusers


def test_the_papers_numbers_of_parameters():
    """560 linears; at rank 4 a mixer in each of them is 16 numbers."""
    from diffusers import UNet2DConditionModel

    counts = {}
    with torch.device("meta"):
        for train_mixer, init in ((False, "identity"), (True, "kaiming_uniform")):  # orthogonal needs real numbers
            unet = UNet2DConditionModel(**REAL_UNET).requires_grad_(False)
            whole = sum(parameter.numel() for parameter in unet.parameters())
            settings = SdxlAdapterSettings(mixer_init=init, train_mixer=train_mixer)
            model = add_adapters(Sdxl(unet, {}, None, latent_scale=1.0), settings)
            trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
            counts[init] = sum(trained.values()), sum("lora_A" in name for name in trained)
    assert whole == 2_567_463_684
    assert counts == {"identity": (5_806_080, 560), "kaiming_uniform": (5_815_040, 560)}


@pytest.mark.parametrize("rank", [0, 65])
def test_a_rank_that_cannot_be(rank):
    from diffusers import UNet2DConditionModel

    from llava_moslora.errors import Refusal
    from support.sdxl import TINY_UNET

    with torch.device("meta"):
        model = Sdxl(UNet2DConditionModel(**TINY_UNET), {}, None, latent_scale=1.0)
        with pytest.raises(Refusal, match="C-RANK"):
            add_adapters(model, SdxlAdapterSettings(lora_r=rank))
