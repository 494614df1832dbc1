"""The composed model against stock transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlavaForConditionalGeneration

from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import assemble
from llava_moslora.text.conversation import IGNORE_INDEX
from support.assembled import build, make_batch
from support.settings import parts_of
from support.tiny import write_clip, write_llm, write_projector


def test_loss_equals_stock_transformers(parts):
    model, tokenizer = build(parts)
    batch = make_batch(tokenizer)
    ours = model(**batch).loss
    stock = LlavaForConditionalGeneration.forward(model, **batch).loss
    torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)


def test_loss_with_a_token_count_is_the_sum_over_it(parts):
    model, tokenizer = build(parts)
    batch = make_batch(tokenizer)
    supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    whole = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=100).loss, whole * supervised / 100)


def test_features_are_the_second_to_last_hidden_state_of_the_whole_tower(parts):
    model, tokenizer = build(parts)
    pixels = make_batch(tokenizer)["pixel_values"]
    tower = CLIPVisionModel.from_pretrained(parts.clip).eval()
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    expected = model.model.multi_modal_projector(expected)
    found = torch.stack(list(model.eval().get_image_features(pixels, return_dict=True).pooler_output))
    assert len(model.model.vision_tower.encoder.layers) == tower.config.num_hidden_layers - 1
    assert torch.equal(found, expected)


def test_text_only_batch_is_the_llm_alone_and_still_reaches_the_tower(parts):
    model, tokenizer = build(parts)
    batch = make_batch(tokenizer, images=False)
    llm = AutoModelForCausalLM.from_pretrained(parts.llm)
    llm.lm_head.weight = model.lm_head.weight  # with the row of <image>, which takes part in every softmax
    llm.config.vocab_size += 1
    torch.testing.assert_close(model(**batch).loss, llm(**batch).loss, rtol=1e-6, atol=1e-6)
    model.requires_grad_(True)
    model(**batch).loss.backward()
    for name, parameter in model.model.named_parameters():
        if "post_layernorm" not in name and "embed_tokens" not in name:
            assert parameter.grad is not None, f"{name} took no part: another rank would wait for it"
    assert all(not p.grad.any() for p in model.model.vision_tower.encoder.parameters())


def test_appended_tokens_get_the_mean_row(parts):
    model, tokenizer = build(parts)
    stock = AutoModelForCausalLM.from_pretrained(parts.llm)
    rows = stock.get_input_embeddings().num_embeddings
    assert len(tokenizer) == rows + 1 == model.config.text_config.vocab_size
    for ours, theirs in [
        (model.get_input_embeddings().weight, stock.get_input_embeddings().weight),
        (model.lm_head.weight, stock.lm_head.weight),
    ]:
        assert torch.equal(ours[:rows], theirs)
        torch.testing.assert_close(ours[rows], theirs.mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_4_bits_are_the_llms_linears_alone(parts, tower):
    """NF4 with double quantisation, computing in the model's dtype, as QLoRA; the rest is not NF4."""
    pytest.importorskip("bitsandbytes")
    model, _ = build(parts, clip=vars(parts)[tower], bits=4)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantised = {n: m for n, m in linears.items() if type(m).__name__ == "Linear4bit"}
    assert set(quantised) == {n for n in linears if n.startswith("model.language_model.layers.")}
    assert len(quantised) == 2 * 7
    for linear in quantised.values():
        state = linear.weight.quant_state
        assert (state.quant_type, state.nested, linear.compute_dtype) == ("nf4", True, torch.float32)
    assert model.is_quantized and model.config.quantization_config is not None  # where PEFT and the Trainer look


def test_a_new_projectors_outputs_are_as_large_as_embeddings(parts):
    model, _ = build(parts, projector=None)
    noise = torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
    ratio = model.model.multi_modal_projector(noise).std() / model.get_input_embeddings().weight.std()
    assert 0.8 < ratio < 1.25


def test_tied_head_stays_tied(parts, tmp_path):
    folder = write_llm(tmp_path / "llm", tie_word_embeddings=True)
    model, tokenizer = build(parts, llm=folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(model.lm_head.weight) == len(tokenizer)


# C15: a hub's name in place of a folder
@pytest.mark.parametrize("what", ["llm", "clip", "projector"])
def test_missing_folder_is_named(parts, tmp_path, what):
    with pytest.raises(Refusal, match=r"nowhere"):
        if what == "llm":
            settings = parts_of(tmp_path / "nowhere", parts.clip, parts.projector)
            assemble(settings, tokenizer=None, dtype=torch.float32)
        else:
            build(parts, **{what: tmp_path / "nowhere"})


def test_wrong_projector_is_refused(parts, tmp_path):
    file = write_projector(tmp_path / "p.safetensors", vision=48)
    with pytest.raises(Refusal, match=r"found \[64, 48\]; expected \[64, 32\] \(vision width 32, LLM width 64\)"):
        build(parts, projector=file)


def test_other_size_of_tower(parts, tmp_path):
    folder = write_clip(tmp_path / "clip", image_size=16, num_hidden_layers=4)
    model, _ = build(parts, clip=folder)
    assert model.config.image_seq_length == 4 and model.config.vision_feature_layer == 3
