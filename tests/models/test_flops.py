"""The floating-point operations behind the MFU, against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_moslora.config import TowerAdapter
from llava_moslora.models.adapt import add_adapters, train_projector_only
from llava_moslora.models.flops import Flops
from support.assembled import build
from support.settings import adapters

TOKENS, TRAINED, IMAGES = 40, 6, 2


def model_of(parts, adapted: bool, tower: str):
    model, _ = build(parts, clip=vars(parts)[tower])
    model.set_attn_implementation("eager")  # torch's counter knows products of matrices
    if adapted:
        same = TowerAdapter(4, 8, 0.0)
        return add_adapters(model, adapters(same, same)).train()
    return train_projector_only(model).train()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(("adapted", "tolerance"), [(False, 0.01), (True, 0.05)])
def test_flops_are_torchs(parts, adapted, tolerance, tower):
    """With adapters backward recomputes some products, which the model's work does not count."""
    model = model_of(parts, adapted, tower)
    size = model.config.vision_config.image_size
    ids = torch.full((1, TOKENS), 5)
    ids[0, 2 : 2 + IMAGES * 16] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[0, -TRAINED:] = 5
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=torch.zeros(IMAGES, 3, size, size), labels=labels).loss.backward()
    flops = Flops.of(model)
    counted = flops.token * TOKENS + flops.pair * TOKENS**2 + flops.trained_token * TRAINED + flops.image * IMAGES
    assert counted == pytest.approx(counter.get_total_flops(), rel=tolerance)
