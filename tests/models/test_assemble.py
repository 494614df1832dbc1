"""The composed model against stock transformers, and where its adapters sit."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlavaForConditionalGeneration

from llava_moslora.errors import Refusal
from llava_moslora.models.assemble import TowerAdapter, add_adapters, assemble, describe, train_projector_only
from llava_moslora.text.conversation import IGNORE_INDEX
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer
from support.tiny import write_clip, write_llm, write_projector

PATCHES = 16  # 32×32 pixels in 8×8 patches


def build(parts, **changes):
    tokenizer = load_tokenizer(changes.get("llm", parts.llm))
    settings = {"llm": parts.llm, "clip": parts.clip, "projector": parts.projector, "bits": 16} | changes
    model, _ = assemble(
        settings["llm"],
        settings["clip"],
        settings["projector"],
        tokenizer=tokenizer,
        image_token_id=image_token_id(tokenizer),
        dtype=torch.float32,
        bits=settings["bits"],
    )
    return model, tokenizer


def make_batch(tokenizer, images: bool = True) -> dict[str, torch.Tensor]:
    """Two rows of unlike length, right-padded, the first ``PATCHES`` ids of each an image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (2, 30), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 24:] = 0
    labels = ids.clone()
    labels[:, :20] = IGNORE_INDEX
    labels[1, 24:] = IGNORE_INDEX
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if images:
        ids[:, 1 : 1 + PATCHES] = image_token_id(tokenizer)
        batch["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    return batch


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
    """NF4 with double quantisation, computing in the model's dtype, as QLoRA; head, tower and projector stay whole."""
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


def test_every_trained_tensor_gets_gradient_in_both_towers(parts):
    model, tokenizer = build(parts)
    model = add_adapters(model, TowerAdapter(4, 8, 0.0), TowerAdapter(2, 4, 0.0))
    with torch.no_grad():  # with B at 0 only B has a gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model(**make_batch(tokenizer)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    towers = {"model.language_model": 2 * 7, "model.vision_tower": 2 * 6}
    for tower, linears in towers.items():
        for part in ("lora_A", "lora_mixer", "lora_B"):
            assert sum(tower in name and part in name for name in trained) == linears
    assert sum("multi_modal_projector" in name for name in trained) == 4
    assert not any("layers.2" in name for name in trained if "vision_tower" in name)  # the unused last layer


def test_per_tower_settings(parts):
    model, _ = build(parts)
    model = add_adapters(
        model,
        TowerAdapter(4, 8, 0.1, target_modules=("q_proj",)),
        TowerAdapter(2, 16, 0.0, "identity", False, ("fc1",)),
    )
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 4
    for name, layer in layers.items():
        vision = "vision_tower" in name
        assert layer.r["default"] == (2 if vision else 4)
        assert layer.scaling["default"] == (8 if vision else 2)
        assert ("lora_mixer" in dict(layer.named_children()) and len(layer.lora_mixer) > 0) != vision


@pytest.mark.parametrize("tower", ["llm", "vision"])
def test_one_tower_alone(parts, tower):
    model, _ = build(parts)
    spec = TowerAdapter(2, 4)
    model = add_adapters(model, spec if tower == "llm" else None, spec if tower == "vision" else None)
    names = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    assert names and all(("vision_tower" in n) == (tower == "vision") for n in names)


def test_unmatched_target_is_named(parts):
    model, _ = build(parts)
    with pytest.raises(Refusal, match=r"--vision_lora_target_modules: .*found gate_proj; expected .*mlp\.fc1"):
        add_adapters(model, TowerAdapter(2, 4), TowerAdapter(2, 4, target_modules=("fc1", "gate_proj")))
    with pytest.raises(Refusal, match="no adapter asked for"):
        add_adapters(model, None, None)


def test_a_rank_above_a_linears_smaller_side_is_refused(parts):
    model, _ = build(parts)
    named = r"--lora_r: the rank is above the smaller side of model.language_model.layers.0.self_attn.k_proj"
    with pytest.raises(Refusal, match=named + "; found 33 for 64 → 32; expected at most 32"):
        add_adapters(model, TowerAdapter(33, 8), None)
    add_adapters(model, TowerAdapter(33, 8, target_modules=("q_proj",)), None)


def test_stage_1_trains_the_projector_alone(parts):
    model, tokenizer = build(parts, projector=None)
    model = train_projector_only(model)
    model(**make_batch(tokenizer)).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if "multi_modal_projector" in n} and len(trained) == 4


def test_new_projector_speaks_at_the_volume_of_words(parts):
    model, _ = build(parts, projector=None)
    noise = torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
    ratio = model.model.multi_modal_projector(noise).std() / model.get_input_embeddings().weight.std()
    assert 0.8 < ratio < 1.25


def test_tied_head_stays_tied(parts, tmp_path):
    folder = write_llm(tmp_path / "llm", tie_word_embeddings=True)
    model, tokenizer = build(parts, llm=folder)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(model.lm_head.weight) == len(tokenizer)


def test_describe_counts_every_parameter_once(parts):
    model, _ = build(parts)
    total = sum(p.numel() for p in model.parameters())
    model = add_adapters(model, TowerAdapter(4, 8), TowerAdapter(2, 4))
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    last = describe(model).splitlines()[-1].replace(",", "").split()
    assert [int(n) for n in last[1:3]] == [total + adapters, trained]


@pytest.mark.parametrize("what", ["llm", "clip", "projector"])
def test_missing_folder_is_named(parts, tmp_path, what):
    with pytest.raises(Refusal, match=r"nowhere"):
        if what == "llm":
            assemble(
                tmp_path / "nowhere", parts.clip, parts.projector, tokenizer=None, image_token_id=0, dtype=torch.float32
            )
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
