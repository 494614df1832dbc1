"""Every adapter method: trained, killed, resumed to the same bytes, loaded, and exported with its proof."""

import json
import shutil

import pytest
import torch

from llava_moslora.adapters.methods import METHODS
from llava_moslora.config import ADAPTER_METHODS
from llava_moslora.errors import Refusal
from llava_moslora.export.export import REPORT, export
from llava_moslora.training.callbacks import adapter_stats
from support.export_runs import probe_here
from support.text_runs import text_flags, write_alpaca
from support.training_runs import adapter, losses, rows, train

FILES = ["adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json"]
EQUAL_TOWERS = {"vision_lora_r": 4, "lora_alpha": 8, "vision_lora_alpha": 8}


def flags(method: str) -> dict:
    """Ranks and alphas that differ between the towers, where the method can have such."""
    return {"method": method} | (EQUAL_TOWERS if method == "adalora" else {"lora_alpha": 8, "vision_lora_alpha": 6})


def is_sound(parts, folder, monkeypatch, formats: list[str], steps: int, **same) -> None:
    """``run`` trains to the end, ``again`` as if it were killed after half of the steps; both end in the same bytes.
    The run is exported with a proof."""
    run, again = folder / "run", folder / "again"
    same |= {"save_steps": steps // 2, "resume": True, "max_steps": steps, "health_steps": steps // 2}
    train(parts, run, **same)
    shutil.copytree(run, again)
    shutil.rmtree(again / f"checkpoint-{steps}")
    train(parts, again, **same)
    for file in FILES:
        one, other = (folder / f"checkpoint-{steps}" / file for folder in (run, again))
        assert one.read_bytes() == other.read_bytes(), file
    assert losses(again)[-(steps // 2) :] == losses(run)[-(steps // 2) :]
    assert json.loads((run / "run.json").read_text())["settings"]["adapter"]["method"] == same["method"]

    row, saved = METHODS[same["method"]], adapter(run, steps)
    kinds = {adapter_stats.adapter_tensor(f"{name}.") for name in saved} - {None}
    assert kinds - {"lokr_w2", "lokr_w2_a", "lokr_w2_b"} == {
        kind for kind in {*row.trained, *row.saved} if not kind.startswith("lokr_w2")
    }
    logged = next(row for row in rows(run) if row.get("step") == steps)
    assert {name.split("/")[-1] for name in logged if name.startswith("gradient/llm/")} <= set(row.trained)
    assert ("delta/llm" in logged) == row.own_layer == ("weight/llm/" not in " ".join(logged))

    probe_here(monkeypatch)
    for exported in export(run, folder / "exported", formats).values():
        report = json.loads((exported / REPORT).read_text())
        assert report["largest_difference"]["logits"] <= 1e-5
        assert report["same_greedy_answers"]


FAST_LLAVA, FAST_LLM = ("dora", "pissa"), ("lokr", "adalora")  # all others: slow, below


@pytest.mark.parametrize("method", FAST_LLAVA)
def test_a_llava(parts, tmp_path, monkeypatch, method):
    is_sound(parts, tmp_path, monkeypatch, ["hf"], 4, **flags(method))


@pytest.mark.parametrize("method", FAST_LLM)
def test_an_llm(parts, tmp_path, monkeypatch, method):
    data = write_alpaca(tmp_path / "alpaca.json")
    is_sound(parts, tmp_path, monkeypatch, ["llm", "peft"], 4, **text_flags(parts, data, method=method))


@pytest.mark.slow
@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_twenty_steps_of_a_llava(parts, tmp_path, monkeypatch, method):
    is_sound(parts, tmp_path, monkeypatch, ["hf", "peft"], 20, **flags(method))


@pytest.mark.slow
@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_twenty_steps_of_an_llm(parts, tmp_path, monkeypatch, method):
    data = write_alpaca(tmp_path / "alpaca.json")
    is_sound(parts, tmp_path, monkeypatch, ["llm", "peft"], 20, **text_flags(parts, data, method=method))


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.not_over_nf4])
def test_over_nf4(parts, tmp_path, monkeypatch, method):
    """Exported over the original weights."""
    data = write_alpaca(tmp_path / "alpaca.json")
    is_sound(parts, tmp_path, monkeypatch, ["llm", "peft"], 4, **text_flags(parts, data, method=method, bits=4))


# What is refused, before anything is loaded: flags → key and reason
REFUSED = {
    "a mixer of LoRA": ({"method": "lora", "mixer_init": "orthogonal"}, "--mixer_init: has no effect: LoRA has a"),
    "a trained mixer that is not there": ({"method": "folded", "mixer_lr": 1e-3}, "--mixer_lr: .*trains no mixer"),
    "a mixer of DoRA": ({"method": "dora", "train_mixer": False}, "--train_mixer: has no effect: DoRA has a fixed"),
    "the tower's mixer": ({"method": "flora", "vision_mixer_init": "normal"}, "--vision_mixer_init: has no effect"),
    "a rate of no mixer": ({"method": "tsmix", "mixer_lr": 1e-3}, "--mixer_lr: has no effect: .* trains no mixer"),
    "LoRA+ of LoHa": ({"method": "loha", "lora_plus_ratio": 4}, "--lora_plus_ratio: has no effect: LoHa trains no B"),
    "LoRA+ of LoRA-XS": ({"method": "loraxs", "lora_plus_ratio": 4}, "--lora_plus_ratio: .*LoRA-XS trains no B"),
    "dropout of LoKr": ({"method": "lokr", "lora_dropout": 0.1}, "--lora_dropout: has no effect: PEFT's LoKr has no"),
    "LoHa over NF4": ({"method": "loha", "bits": 4}, "--method loha, --bits 4: .*4-bit weights are stored in a"),
    "LoKr over NF4": ({"method": "lokr", "bits": 4}, "--method lokr, --bits 4: .*4-bit weights are stored in a"),
    "two ranks": ({"method": "adalora"}, r"--lora_r, --vision_lora_r: PEFT's AdaLoRA has one for all modules; found 4"),
    "two dropouts": ({"method": "dora", "lora_dropout": 0.1}, "--lora_dropout, --vision_lora_dropout: PEFT's DoRA"),
    "an odd rank": ({"method": "tsmix", "lora_r": 3}, "C-RANK.*--lora_r"),
    "stage 1": ({"method": "dora", "tune_mm_mlp_adapter": True}, "--method: stage 1 trains no adapters"),
    "an unknown one": ({"method": "melora"}, "--method: invalid choice: 'melora'"),
    "a preconditioned mixer": ({"riemannian": True}, "--riemannian: has no effect: .*which MoSLoRA's update is not"),
    "no ratio": ({"lora_plus_ratio": 0}, "--lora_plus_ratio: out of range"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(parts, tmp_path, monkeypatch, case):
    import scripts.train_vit_llm as script

    monkeypatch.setattr(script, "read_llm_config", lambda path: pytest.fail("a model was looked at"))
    changes, message = REFUSED[case]
    with pytest.raises(Refusal, match=message):
        train(parts, tmp_path / "run", **changes)


def test_adalora_cannot_be_merged_into_nf4_nor_exported_as_a_lora(parts, tmp_path):
    data = write_alpaca(tmp_path / "alpaca.json")
    given = text_flags(parts, data, method="adalora", bits=4, save_steps=2)
    train(parts, tmp_path / "run", **given)
    with pytest.raises(Refusal, match=r"C-FLAG.*--merge_base.*AdaLoRA can only be merged into the original weights"):
        export(tmp_path / "run", tmp_path / "out", ["llm"], merge_base="dequantized")
    assert export(tmp_path / "run", tmp_path / "out", ["llm"], prove=False)


def test_adaloras_term_counts_once_per_step(parts, tmp_path):
    """Two micro-batches of two, of four of one record, one batch of four: the same sums; both parts are in the log."""
    data = write_alpaca(tmp_path / "alpaca.json")
    same = text_flags(parts, data, method="adalora", lora_dropout=0, max_steps=3, data_order="sequential")
    found = {}
    for size, average in ((4, "tokens"), (2, "tokens"), (1, "tokens"), (2, "micro_batch")):
        run = tmp_path / f"{size}-{average}"
        train(
            parts, run, **same | {"per_device_train_batch_size": size, "global_batch_size": 4, "loss_average": average}
        )
        found[size, average] = rows(run)
    first = found[4, "tokens"]
    for log in found.values():
        for row, other in zip(log, first, strict=True):
            assert row["orthogonality"] == pytest.approx(other["orthogonality"], abs=1e-4)
    for size in (2, 1):
        assert [row["loss"] for row in found[size, "tokens"]] == pytest.approx([row["loss"] for row in first], abs=1e-4)
    assert first[0]["orthogonality"] > 0.1
    for (size, average), log in found.items():  # the update is zero at first: what is left is the loss of any method
        run, batches = (
            tmp_path / f"lora-{size}-{average}",
            {"per_device_train_batch_size": size, "loss_average": average},
        )
        train(parts, run, **same | batches | {"global_batch_size": 4, "method": "lora", "max_steps": 1})
        assert log[0]["cross_entropy"] == pytest.approx(losses(run)[0], abs=1e-4)


ONE_STEP = {"method": "lora", "lora_dropout": 0, "max_steps": 1, "save_steps": 1, "optim": "sgd"}
ONE_STEP |= {"max_grad_norm": 0, "warmup_steps": 0, "weight_decay": 0, "lr_scheduler_type": "constant"}


def test_lora_plus_multiplies_the_rate_of_b_alone(parts, tmp_path):
    for ratio in (1, 8):
        train(parts, tmp_path / f"{ratio}", **ONE_STEP | {"lora_plus_ratio": ratio})
    plain, plus = (adapter(tmp_path / f"{ratio}", 1) for ratio in (1, 8))
    for name, tensor in plain.items():
        factor = 8 if "lora_B" in name else 1
        assert torch.allclose(plus[name], factor * tensor, rtol=1e-5, atol=1e-9), name
    assert all(tensor.any() for name, tensor in plain.items() if "lora_B" in name)


def test_riemannian_gradients_are_preconditioned(parts, tmp_path):
    """In the first step B alone moves: by its gradient times (A·Aᵀ + δ·I)⁻¹ (Zhang and Pilanci 2024, equation 2)."""
    for name, changes in (("plain", {}), ("riemannian", {"riemannian": True})):
        train(parts, tmp_path / name, **ONE_STEP | changes)
    plain, moved = (adapter(tmp_path / name, 1) for name in ("plain", "riemannian"))
    for name in (name for name in plain if "lora_B" in name):
        a = plain[name.replace("lora_B", "lora_A")].double()
        expected = plain[name].double() @ torch.linalg.inv(a @ a.T + 1e-2 * torch.eye(len(a)))
        assert torch.allclose(moved[name].double(), expected, rtol=1e-4, atol=1e-7), name
    assert all(torch.equal(plain[name], moved[name]) for name in plain if "lora_B" not in name)
