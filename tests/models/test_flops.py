"""The floating-point operations behind the MFU, against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_moslora.models.assemble import TowerAdapter, add_adapters, assemble, train_projector_only
from llava_moslora.models.flops import Flops
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer

TOKENS, TRAINED, IMAGES = 40, 6, 2


def model_of(parts, adapters: bool, tower: str):
    tokenizer = load_tokenizer(parts.llm)
    model, _ = assemble(
        parts.llm,
        str(vars(parts)[tower]),
        parts.projector,
        tokenizer=tokenizer,
        image_token_id=image_token_id(tokenizer),
        dtype=torch.float32,
    )
    model.set_attn_implementation("eager")  # torch's counter knows products of matrices
    if adapters:
        return add_adapters(model, TowerAdapter(4, 8, 0.0), TowerAdapter(4, 8, 0.0)).train()
    return train_projector_only(model).train()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(("adapters", "tolerance"), [(False, 0.01), (True, 0.05)])
def test_flops_are_torchs(parts, adapters, tolerance, tower):
    """With adapters backward recomputes some products, which the model's work does not count."""
    model = model_of(parts, adapters, tower)
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
