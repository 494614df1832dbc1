"""What --suggest offers runs, and its order is that of measured times, as far as a CPU computes what a GPU would."""

import math
import time

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_moslora.config import AdapterSettings
from llava_moslora.models.assemble import model_on_meta
from llava_moslora.planning.plan import Request, make_plan
from llava_moslora.planning.records import assumed
from llava_moslora.planning.report import as_json
from llava_moslora.planning.setting import Choice, Model
from llava_moslora.planning.suggest import as_flags
from llava_moslora.recompute import set_recompute
from support.planned import zero
from support.tiny import TOWER
from support.training_runs import losses, train

pytestmark = pytest.mark.slow
LLM = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
LLM |= {"num_key_value_heads": 4, "vocab_size": 400}
ROWS, TOKENS = 4, 256
ROUNDS = 6


def request() -> Request:
    """An LLM whose matrices are what a CPU spends its time on."""
    adapter = AdapterSettings(lora_r=8, vision_lora_r=8)
    model = Model(LlamaConfig(**LLM), CLIPVisionConfig(**TOWER), adapter, torch.float32)
    now = Choice(ROWS, 1, "full", 16, zero("zero1"), "zero_configs/zero1.json")
    zeros = ((now.zero_file, now.zero),)
    return Request(model, now, assumed(TOKENS, 100, TOKENS, 1, 32, 16), "H100", gpus=1, zeros=zeros)


def test_the_order_of_the_alternatives_is_the_measured_one():
    """Of those that ``--suggest --json`` prints, and of recomputing everything. CPU seconds of forward and backward: by
    the process's clock, because others may use the machine; in turn, so that a slow minute slows all of them."""
    asked = request()
    plan = make_plan(asked, with_suggestions=True, with_largest=False)
    printed = [dict(zip(*[iter(one["flags"].split())] * 2, strict=True)) for one in as_json(plan)["suggestions"]]
    assert {flags["--per_device_train_batch_size"] for flags in printed} == {str(ROWS)}
    modes = [flags["--recompute"] for flags in printed if flags["--recompute"] != "selective"]
    assert len(modes) >= 3 and modes[0] == "none"
    planned = {mode: asked.duration(Choice(ROWS, 1, mode, 16, asked.choice.zero)).compute for mode in (*modes, "full")}
    measured = seconds(asked.model, [*planned])
    print({mode: f"{measured[mode]:.3f} s measured, {planned[mode]:.2g} planned" for mode in measured})
    assert sorted(measured, key=measured.get) == sorted(planned, key=planned.get) == [*modes, "full"]


def seconds(model: Model, modes: list[str]) -> dict[str, float]:
    """The least of each way to recompute, over rounds of all of them."""
    whole = model_on_meta(model.llm_config, model.vision_config, model.adapter, model.dtype).train()
    whole.to_empty(device="cpu")
    with torch.no_grad():
        for p in whole.parameters():
            p.normal_(std=0.02)
        for name, buffer in whole.named_buffers():  # to_empty has forgotten them
            buffer.zero_() if "position_ids" not in name else buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    places = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
    inputs = {"input_ids": places % 400, "labels": places % 400, "label_positions": places[:, -32:].flatten()}
    inputs |= {"pixel_values": torch.randn(ROWS, 3, 32, 32), "image_positions": places[:, :16].flatten()}
    least = dict.fromkeys(modes, math.inf)
    for _ in range(ROUNDS):
        for mode in modes:
            set_recompute(whole, mode)
            begin = time.process_time()
            whole(**inputs).loss.backward()
            least[mode] = min(least[mode], time.process_time() - begin)
    return least


def test_what_is_suggested_trains_the_same(parts, tmp_path):
    """Every suggestion, pasted behind the command, runs, with the losses of the setting that was asked about."""
    plan = make_plan(request(), with_suggestions=True, with_largest=False)
    exact = {"lora_dropout": 0, "vision_lora_dropout": 0, "max_steps": 3, "save_strategy": "no", "logging_steps": 1}
    train(parts, tmp_path / "asked", **exact, per_device_train_batch_size=ROWS, recompute="full")
    for number, candidate in enumerate(plan.suggestions):
        words = as_flags(candidate.choice).split()
        flags = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
        del flags["deepspeed"]  # of one process, without its launcher
        train(parts, tmp_path / f"run-{number}", **(exact | flags))
        assert losses(tmp_path / f"run-{number}") == pytest.approx(losses(tmp_path / "asked"), rel=1e-5)
