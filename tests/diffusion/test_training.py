"""The loss, its gradient and whole runs, next to diffusers' formula and to PEFT's LoRA; resumed runs; the noise."""

import hashlib

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import BatchSampler

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.diffusion.batches import Pictures
from llava_moslora.diffusion.model import Sdxl, add_adapters, build_model
from llava_moslora.errors import Refusal
from llava_moslora.sdxl_settings import SdxlAdapterSettings
from llava_moslora.training import trainer
from support.sdxl import SEED, STATE, losses, needs_diffusers, pictures_of, plain_loss, plain_losses, train

pytestmark = needs_diffusers
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LORA = {"mixer_init": "identity", "train_mixer": False}


@pytest.fixture(scope="module")
def dataset(parts, cache):
    return pictures_of(parts, cache)[0]


def built(parts, cache, **settings):
    _, folder = pictures_of(parts, cache)
    asked = SdxlAdapterSettings(**settings)
    torch.manual_seed(SEED)
    return add_adapters(build_model(folder, asked, torch.float32), asked)


def test_one_steps_loss_and_gradient_are_diffusers(parts, cache, dataset):
    model, batch = built(parts, cache), dataset.complete([0, 3], step=7, positions=[0, 1])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ours = model(**batch)["loss"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(ours, trained.values())
    inner = model.get_base_model()
    written_out = plain_loss(inner.unet, batch, inner.scheduler)
    expected = torch.autograd.grad(written_out, trained.values())
    assert abs(ours - written_out) < 1e-6 and ours > 0.1
    for name, found, right in zip(trained, gradients, expected, strict=True):
        assert torch.allclose(found, right, atol=1e-6) and found.any(), name


def test_a_frozen_identity_is_pefts_lora_step_by_step(parts, cache, tmp_path):
    train(parts, tmp_path / "run", data_cache=cache, max_steps=3, lora_alpha=8, **LORA)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=TARGETS)
    expected = plain_losses(parts, cache, lambda unet: unet.add_adapter(config), steps=3)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 4) for loss in expected}) == 3


@pytest.fixture(scope="module")
def whole(parts, cache, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(parts, folder, data_cache=cache, max_steps=4, save_steps=2)
    return folder


def test_a_run_is_a_plain_loop(parts, cache, whole):
    config = MosLoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", mixer_init="orthogonal",
                           target_modules=TARGETS)  # fmt: skip
    expected = plain_losses(parts, cache, lambda unet: unet.add_adapter(config), steps=4)
    assert losses(whole) == pytest.approx(expected, rel=1e-5)
    assert not list(whole.rglob("pytorch_lora_weights*"))  # diffusers would drop the mixers


class Killed(BaseException):
    """Nothing handles it: files are left as they are."""


def ends_at_call(function, number):
    """``function``, of which this call ends the process."""
    calls = []

    def called(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            raise Killed
        return function(*args, **kwargs)

    return called


@pytest.mark.parametrize("moment", ["in step 4", pytest.param("in the second save", marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_bytes(parts, whole, tmp_path, monkeypatch, moment):
    """tests/faults/test_sdxl.py kills processes. Here the latents are computed again too."""
    if moment == "in step 4":
        monkeypatch.setattr(Sdxl, "forward", ends_at_call(Sdxl.forward, 3 * 4 + 2))
    else:
        monkeypatch.setattr(trainer, "write_optimizer", ends_at_call(trainer.write_optimizer, 2))
    changes = {"max_steps": 4, "save_steps": 2, "resume": True}
    with pytest.raises(Killed):
        train(parts, tmp_path / "run", **changes)
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoint-2").is_dir() and not (tmp_path / "run" / "checkpoint-4").exists()
    train(parts, tmp_path / "run", **changes)
    for name in STATE:
        file = f"checkpoint-4/{name}"
        assert (whole / file).read_bytes() == (tmp_path / "run" / file).read_bytes()
    assert losses(whole) == losses(tmp_path / "run")


def test_another_prompt_is_another_run(parts, cache, whole):
    with pytest.raises(Refusal, match=r"K-CHANGED.*prompt.*sks"):
        train(parts, whole, data_cache=cache, max_steps=4, save_steps=2, resume=True, prompt="a photo of sks cat")


def hashes(dataset: Pictures, per_device: int, accumulation: int, ranks: int = 1) -> list[set]:
    """Step → the hashes of its pictures with their noise, over all ranks, as the Trainer asks for them."""
    found: list[set] = []
    for rank in range(ranks):
        sampler = dataset.sampler(
            per_device_batch_size=per_device, accumulation=accumulation, world_size=ranks, rank=rank, seed=SEED
        )
        for step, micro_batches in enumerate(BatchSampler(sampler, accumulation, drop_last=True)):
            found += [set()] if rank == 0 else []
            for number, records in enumerate(micro_batches):
                first = number * per_device * ranks + rank
                batch = dataset.complete(records, step, range(first, first + len(records) * ranks, ranks))
                for row in range(len(records)):
                    parts = (batch[name][row].numpy().tobytes() for name in sorted(batch))
                    found[step].add(hashlib.sha256(b"".join(parts)).hexdigest())
    return found


def test_the_noise_is_the_steps_and_the_positions(dataset):
    """However a global batch is split over ranks and micro-batches; never the same twice."""
    one = hashes(dataset, 1, 4)
    assert [len(step) for step in one] == [4] * 5 and len(set().union(*one)) == 20
    assert one == hashes(dataset, 4, 1) == hashes(dataset, 1, 2, ranks=2) == hashes(dataset, 2, 1, ranks=2)
    other = Pictures(dataset.pictures, dataset.encoded, SEED + 1, 1000)
    assert not set().union(*one) & set().union(*hashes(other, 1, 4))


def test_lora_and_moslora_see_the_same_noise(parts, cache, tmp_path, monkeypatch):
    seen: dict[str, list] = {}

    def noting(name, **settings):
        forward = Sdxl.forward

        def noted(self, **batch):
            seen.setdefault(name, []).append({k: v.clone() for k, v in batch.items()})
            return forward(self, **batch)

        monkeypatch.setattr(Sdxl, "forward", noted)
        train(parts, tmp_path / name, data_cache=cache, max_steps=1, save_strategy="no", **settings)
        monkeypatch.undo()

    noting("lora", **LORA), noting("moslora")
    assert len(seen["lora"]) == len(seen["moslora"]) == 4
    for one, other in zip(seen["lora"], seen["moslora"], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_every_picture_is_seen_equally_often(dataset):
    order = dataset.sampler(per_device_batch_size=4, seed=0).epoch_order().tolist()
    assert sorted(order) == sorted([0, 1, 2, 3, 4] * 4) and order != sorted(order)


def test_snr_weights_and_prior_preservation(parts, cache):
    """min-SNR: Hang et al. 2023; a timestep with little noise counts less."""
    _, folder = pictures_of(parts, cache)
    model = build_model(folder, SdxlAdapterSettings(snr_gamma=5.0), torch.float32)
    steps = torch.tensor([10, 500, 990])
    alphas = model.scheduler.alphas_cumprod[steps]
    expected = [min(snr, 5.0) / snr for snr in (alphas / (1 - alphas)).tolist()]
    assert model.snr_weights(steps).tolist() == pytest.approx(expected) and expected[0] < 0.1 and expected[2] == 1
    model.scheduler.register_to_config(prediction_type="v_prediction")
    velocity = [min(snr, 5.0) / (snr + 1) for snr in (alphas / (1 - alphas)).tolist()]
    assert model.snr_weights(steps).tolist() == pytest.approx(velocity)

    both, _ = pictures_of(parts, cache, class_image_folder=str(parts.kind), class_prompt="a photo of cat")
    batch = both.complete([0, 1], step=0, positions=[0, 1])
    assert len(batch["mean"]) == 4 and not torch.equal(batch["embeds"][0], batch["embeds"][2])
    plain = build_model(folder, SdxlAdapterSettings(prior_loss_weight=0.5), torch.float32, preserves_prior=True)
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(2), slice(2, 4))]
    subject, prior = (plain_loss(plain.unet, half, plain.scheduler) for half in halves)
    assert abs(plain(**batch)["loss"] - (subject + 0.5 * prior)) < 1e-6


@pytest.mark.slow
def test_text_encoders_and_recomputation_train_the_same(parts, tmp_path):
    """Text encoders with adapters: as the stored embeddings before the first step, and other ones after it."""
    for name, changes in {
        "stored": {}, "encoders": {"train_text_encoder": True}, "recomputed": {"recompute": "full"},
        "both": {"train_text_encoder": True, "recompute": "full"},
    }.items():  # fmt: skip
        train(parts, tmp_path / name, data_cache=tmp_path / "cache", max_steps=2, **changes)
    found = {name: losses(tmp_path / name) for name in ("stored", "encoders", "recomputed", "both")}
    assert found["recomputed"] == pytest.approx(found["stored"], rel=1e-6)
    assert found["both"] == pytest.approx(found["encoders"], rel=1e-6)
    assert found["encoders"][0] == pytest.approx(found["stored"][0], rel=1e-5)
    assert found["encoders"][1] != pytest.approx(found["stored"][1], rel=1e-6)
