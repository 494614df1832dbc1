"""The methods that stock PEFT has, step for step: our trainer's losses are those of PEFT under a plain loop."""

import pytest
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig

import scripts.train_vit_llm as script
from support.text_runs import plain_loop, text_flags, write_alpaca
from support.training_runs import losses, train

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": TARGETS}
LYCORIS = {"r": 4, "alpha": 8, "target_modules": TARGETS}
ADALORA = {"init_r": 4, "target_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "total_step": 100}
STOCK = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "loha": LoHaConfig(**LYCORIS),
    "lokr": LoKrConfig(**LYCORIS),
    "adalora": AdaLoraConfig(**ADALORA, target_modules=TARGETS, task_type="CAUSAL_LM"),  # else without its term
}
STEPS = 5
SLOW = ("lora", "rslora", "pissa")  # test_text_only.py has plain LoRA


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in STOCK]
)
def test_losses_are_those_of_stock_peft(parts, tmp_path, monkeypatch, method):
    """In float32, from the same start (of PiSSA's decomposition PEFT subtracts its own from the base), with one
    micro-batch per step."""
    first, original = {}, script.add_adapters

    def add_adapters(*args):
        model = original(*args)
        first.update({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return model

    monkeypatch.setattr(script, "add_adapters", add_adapters)
    data = write_alpaca(tmp_path / "alpaca.json")
    changes = {"method": method, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "lora_target_modules": TARGETS}
    changes |= {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0, "data_order": "sequential"}
    changes |= {"train_on_prompt": True, "model_max_length": 512, "weight_decay": 0, "max_steps": STEPS}
    train(parts, tmp_path / "run", **text_flags(parts, data, **changes))
    expected = plain_loop(parts, data, STOCK[method], first, STEPS, True)
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=2e-5)
    assert expected[0] - expected[-1] > 0.02  # it learns; AdaLoRA, whose singular values start at 0, more slowly
