"""The ways to train that must not change what is learned, and the two ways to average a loss."""

import sys

import pytest
import torch

from llava_moslora.training.optimizer_state import trained_parameters
from support.launching import flags, run
from support.training_runs import adapter, losses, rows, stock_model, train

EXACT = {"lora_dropout": 0, "vision_lora_dropout": 0}


@pytest.fixture(scope="module")
def plain(parts, tmp_path_factory):
    """With dropout."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(parts, folder)
    return folder


@pytest.mark.parametrize(
    "how", [{"gradient_checkpointing": True}, {"recompute": "every:2"}, {"recompute": "selective"}], ids=str
)
def test_recomputing_computes_the_same(parts, plain, tmp_path, how):
    """In both towers and with dropout: the same losses and the same adapter, bit for bit."""
    train(parts, tmp_path / "run", **how)
    assert losses(tmp_path / "run") == losses(plain)
    one, other = adapter(tmp_path / "run", 2), adapter(plain, 2)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradient_checkpointing_reaches_both_towers(parts, tmp_path, monkeypatch):
    """Layers are computed again in backward: each runs twice per step."""
    import scripts.train_vit_llm as script

    runs = {"llm": 0, "vision": 0}

    def counted(*args):
        model = add_adapters(*args)
        inner = model.base_model.model.model
        first = {"llm": inner.language_model.layers[0], "vision": inner.vision_tower.encoder.layers[0]}
        for tower, layer in first.items():
            # before the MLP: what runs again stops as soon as backward has what it needs
            layer.mlp.register_forward_pre_hook(lambda *_, tower=tower: runs.__setitem__(tower, runs[tower] + 1))
        return model

    add_adapters = script.add_adapters
    monkeypatch.setattr(script, "add_adapters", counted)
    train(parts, tmp_path / "run", max_steps=1, gradient_checkpointing=True)
    assert runs == {"llm": 2, "vision": 2}


def test_eager_attention_learns_the_same(parts, tmp_path, monkeypatch):
    """And the flag reaches both towers."""
    import scripts.train_vit_llm as script

    seen, original = [], script.assemble

    def assembled(*args, **settings):
        model, preprocessor = original(*args, **settings)
        inner = model.model
        seen.append({part.config._attn_implementation for part in (inner.language_model, inner.vision_tower)})
        return model, preprocessor

    monkeypatch.setattr(script, "assemble", assembled)
    train(parts, tmp_path / "sdpa", **EXACT)
    train(parts, tmp_path / "eager", attn_implementation="eager", **EXACT)
    assert seen == [{"sdpa_maskless", "sdpa"}, {"eager"}]
    assert losses(tmp_path / "eager") == pytest.approx(losses(tmp_path / "sdpa"), rel=1e-5)


def test_packed_rows_learn_what_padded_ones_do(parts, tmp_path):
    """Through the Trainer, at a batch of four: the same records, fewer rows, the same losses and gradient norms."""
    same = {"per_device_train_batch_size": 4, "model_max_length": 64, "learning_rate": 1e-3, **EXACT}
    train(parts, tmp_path / "padded", **same)
    train(parts, tmp_path / "packed", packing=True, **same)
    for padded, packed in zip(rows(tmp_path / "padded"), rows(tmp_path / "packed"), strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
        assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("average", ["tokens", "micro_batch"])
def test_loss_is_averaged_as_asked(parts, tmp_path, average, monkeypatch):
    """The first step's loss by stock transformers, micro-batch by micro-batch: B is zero, so it is the base model's."""
    import scripts.train_vit_llm as script

    seen = []

    class Watching(script.MosLoraTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append({name: tensor.clone() for name, tensor in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(script, "MosLoraTrainer", Watching)
    same = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "data_order": "shuffle", "max_steps": 1}
    train(parts, tmp_path / "run", loss_average=average, **same)
    stock = stock_model(parts)
    means = [stock(**batch).loss.item() for batch in seen]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in seen]
    assert len(means) == 2 and counts[0] != counts[1]
    weights = counts if average == "tokens" else [1, 1]
    expected = sum(mean * weight for mean, weight in zip(means, weights, strict=True)) / sum(weights)
    assert losses(tmp_path / "run") == [pytest.approx(expected, rel=1e-5)]


def test_stage_1_trains_the_projector_alone(parts, tmp_path, monkeypatch):
    import scripts.train_vit_llm as script

    trainers = []
    make = script.MosLoraTrainer
    monkeypatch.setattr(script, "MosLoraTrainer", lambda *a, **kw: trainers.append(make(*a, **kw)) or trainers[-1])
    train(parts, tmp_path / "run", tune_mm_mlp_adapter=True, health_steps=1, max_steps=2)
    assert {name.split(".")[1] for name in trained_parameters(trainers[0].model)} == {"multi_modal_projector"}
    assert (tmp_path / "run" / "checkpoint-2" / "projector" / "model.safetensors").is_file()
    health = [name for name in rows(tmp_path / "run")[0] if "/" in name]
    assert health == ["gradient/projector"]


@pytest.mark.gpu
def test_ligers_kernels_compute_the_same(parts, tmp_path):
    """Triton's interpreter does not run all of them."""
    pytest.importorskip("liger_kernel")
    same = {**EXACT, "max_steps": 1}
    train(parts, tmp_path / "plain", **same)
    words = flags(parts, tmp_path / "liger", use_liger_kernel=True, dataloader_num_workers=0, **same)
    done = run([sys.executable, "scripts/train_vit_llm.py", *words])
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "liger") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert rows(tmp_path / "liger")[0]["grad_norm"] == pytest.approx(rows(tmp_path / "plain")[0]["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_torch_compile_computes_the_same(parts, tmp_path):
    train(parts, tmp_path / "plain", **EXACT)
    train(parts, tmp_path / "compiled", torch_compile=True, **EXACT)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
