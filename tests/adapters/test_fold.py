"""The two saved forms: the published one is a LoRA for everybody, the training one needs this package."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.fold import LowRank, delta, fold, folded, merge, save
from llava_moslora.adapters.load import read_adapter
from llava_moslora.errors import Refusal
from support.adapter_models import LINEARS, llama, relative

IDS = torch.arange(1, 21)[None]

# A process that never imports this package: stock PEFT loads the published form and refuses the training form.
STOCK = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/published").eval()
torch.save(model(input_ids=torch.arange(1, 21)[None]).logits.detach(), folder + "/logits.pt")
try:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/training")
except KeyError as error:
    assert "MOSLORA" in str(error), error
else:
    sys.exit("stock PEFT loaded a MoSLoRA adapter")
assert not any(name.startswith("llava_moslora") for name in sys.modules)
"""


def trained(**settings):
    """A Llama whose adapter is far from its start, with a trained ``lm_head`` next to it."""
    model = get_peft_model(
        llama(),
        MosLoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=LINEARS,
            modules_to_save=["lm_head"],
            rank_pattern={r"layers\.1\.mlp\..*": 8},
            alpha_pattern={"q_proj": 2},
            mixer_init="normal",
            init_lora_weights=False,
            **settings,
        ),
    ).eval()
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(0.1)
    return model


def test_published_form_in_a_process_without_this_package(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "training")
    llama().save_pretrained(tmp_path / "base")
    save(fold(read_adapter(tmp_path / "training")), tmp_path / "published")
    done = subprocess.run([sys.executable, "-c", STOCK, tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (logits - model(input_ids=IDS).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"train_mixer": False}, {"mixer_init_pattern": {"up_proj": "butterfly"}}],
    ids=str,
)
def test_published_form_is_exact(tmp_path, settings):
    model = trained(**settings)
    model.save_pretrained(tmp_path / "training")
    published = fold(read_adapter(tmp_path / "training"))
    assert type(published.config) is LoraConfig and published.config.r == 4 and published.config.lora_alpha == 16
    save(published, tmp_path / "published")
    stock = PeftModel.from_pretrained(llama(), tmp_path / "published").eval()
    assert type(stock.base_model.model.model.layers[0].mlp.up_proj) is Linear
    assert (stock(input_ids=IDS).logits - model(input_ids=IDS).logits).abs().max() <= 1e-5


def test_training_form_survives_reading_and_saving(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "one")
    save(read_adapter(tmp_path / "one"), tmp_path / "two")
    assert (tmp_path / "two/adapter_config.json").read_text() == (tmp_path / "one/adapter_config.json").read_text()
    again = PeftModel.from_pretrained(llama(), tmp_path / "two").eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_merging_from_the_file_is_merging_in_the_model(tmp_path):
    """What an exporter does, weight by weight, against PEFT's merge_and_unload."""
    model = trained()
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    state = llama().state_dict()
    for name, layer in adapter.layers.items():
        state[f"{name}.weight"] = merge(state[f"{name}.weight"], layer)
    state |= {name: tensor.read() for name, tensor in adapter.others.items()}
    expected = model.merge_and_unload().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_sums_are_rounded_once():
    torch.manual_seed(0)
    a, w, b = torch.randn(8, 64), torch.randn(8, 8), torch.randn(32, 8)
    exact = 0.5 * b.double() @ w.double() @ a.double()
    assert relative(delta(a, w, b, 0.5), exact) <= 1e-6
    assert delta(a.bfloat16(), w.bfloat16(), b.bfloat16(), 0.5).dtype == torch.float32
    assert torch.equal(folded(a, None), a) and folded(a.half(), w.half()).dtype == torch.float32
    weight = torch.randn(32, 64).bfloat16()
    merged = merge(weight, LowRank.of(a, w, b, 0.5))
    assert torch.equal(merged, (weight.double() + delta(a, w, b, 0.5).double()).bfloat16())


@pytest.mark.parametrize(
    "weight", [torch.zeros(2, 3), torch.zeros(32, 64, dtype=torch.uint8)], ids=["shape", "quantised"]
)
def test_merging_into_something_else_is_refused(weight):
    layer = LowRank.of(torch.zeros(8, 64), None, torch.zeros(32, 8), 1.0)
    with pytest.raises(Refusal, match=r"does not fit .* expected a floating-point matrix \(32, 64\)"):
        merge(weight, layer)
