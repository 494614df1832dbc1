"""Names in the composed model: the part of every parameter, and its name where that part stands alone."""

import pytest

from llava_moslora.models.names import part_of, standalone_name


@pytest.mark.parametrize("wrapped", ["", "base_model.model.", "module.base_model.model."], ids=["bare", "PEFT", "DDP"])
@pytest.mark.parametrize(
    ("name", "part", "alone"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "llm", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens", "llm", "model.embed_tokens"),
        ("model.vision_tower.encoder.layers.1.mlp.fc1", "vision_tower", "encoder.layers.1.mlp.fc1"),
        ("model.multi_modal_projector.linear_1.bias", "projector", "linear_1.bias"),
        ("lm_head", "lm_head", "lm_head"),
        ("lm_head.weight", "lm_head", "lm_head.weight"),
    ],
)
def test_part_and_standalone_name(wrapped, name, part, alone):
    assert part_of(wrapped + name) == part
    assert standalone_name(wrapped + name) == alone


@pytest.mark.parametrize("name", ["", "model", "model.language_model_2.x", "my_lm_head.weight"])
def test_a_name_of_no_part_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} is not a name of LlavaForConditionalGeneration"):
        part_of(name)
