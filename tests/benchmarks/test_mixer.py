"""The study of the mixer: its arms, its statistics against tables, its tuning, and that a kill changes nothing."""

import copy
import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from llava_moslora.adapters.layers import init_mixer
from llava_moslora.errors import Refusal
from support.launching import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import mixer_tasks
from mixer import Plan, Runner, best_rate, study, tune
from mixer_plot import draw
from mixer_report import mean, paired, report_of, t_cdf, t_quantile
from mixer_tasks import Images, Text, docstrings, strange
from mixer_train import ARMS, RANK, Run, add_adapters, batches, rate_at

PLAN = Plan(steps=4, batch=8, rates=(1e-2, 2e-2, 4e-2), tuning_seeds=(100, 101), seeds=(0, 1, 2))


class Toy:
    """Two linears of width 16 that tell four classes apart."""

    targets = r".*\.(0|2)"
    train_examples, digest = 32, "toy"

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))})
        self.model.requires_grad_(False)
        self.x, self.y = torch.randn(64, 16), torch.arange(64) % 4

    def fresh(self):
        return copy.deepcopy(self.model)

    def head(self):
        return nn.Linear(16, 4)

    def loss(self, model, head, examples):
        return F.cross_entropy(head(model.base_model.model["net"](self.x[examples])), self.y[examples])

    def measure(self, model, head, part):
        examples = torch.arange(32, 48) if part == "validation" else torch.arange(48, 64)
        return self.loss(model, head, examples).item(), 0.5


def runner(file, plan=PLAN):
    return Runner({"toy": Toy()}, {"toy": plan}, file, folders={}, workers=0)


def factors(arm, seed=3):
    """(A, W or None, B) of the first linear."""
    layer = add_adapters(Toy(), arm, seed).base_model.model["net"][0]
    mixers = getattr(layer, "lora_mixer", {})
    w = mixers["default"].weight if "default" in mixers else None
    return layer.lora_A["default"].weight, w, layer.lora_B["default"].weight


def test_arms_start_from_the_same_factors_at_a_seed():
    a, _, _ = factors("lora")
    _, w, _ = factors("moslora_kaiming")
    for arm in ARMS:
        found, _, b = factors(arm)
        expected = w @ a if arm == "folded_kaiming" else a
        torch.testing.assert_close(found, expected)
        assert not b.any()
    assert torch.equal(factors("frozen_kaiming")[1], w) and not torch.equal(factors("lora", seed=4)[0], a)
    orthogonal = factors("moslora_orthogonal")[1]
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(RANK), rtol=0, atol=1e-5)
    butterfly = torch.empty(RANK, RANK)
    init_mixer(butterfly, "butterfly")
    assert torch.equal(factors("two_subspaces")[1], butterfly)


def test_what_each_arm_trains():
    trained = {}
    for arm in ARMS:
        names = [n for n, p in add_adapters(Toy(), arm, 0).named_parameters() if p.requires_grad]
        trained[arm] = {n.split(".lora_")[1].split(".")[0] for n in names}
    with_mixer = {"moslora_kaiming", "moslora_orthogonal"}
    assert trained == {arm: {"A", "B", "mixer"} if arm in with_mixer else {"A", "B"} for arm in ARMS}


def test_every_arm_sees_the_same_examples():
    order = torch.cat(list(batches(10, 4, 5, seed=1)))
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert torch.equal(order, torch.cat(list(batches(10, 4, 5, seed=1))))
    assert not torch.equal(order, torch.cat(list(batches(10, 4, 5, seed=2))))
    assert [rate_at(step, 20) for step in (0, 1, 2, 11, 19)] == pytest.approx([0.5, 1, 1, 0.5, 1 / 18])


def test_t_distribution_is_that_of_the_tables():
    assert t_quantile(0.975, 19) == pytest.approx(2.093024, abs=1e-6)
    assert t_quantile(0.975, 4) == pytest.approx(2.776445, abs=1e-6)
    assert t_quantile(0.995, 1) == pytest.approx(63.65674, abs=1e-4)
    assert 2 * (1 - t_cdf(2.5, 9)) == pytest.approx(0.0338618, abs=1e-6)


def test_paired_difference_of_a_worked_example():
    found = paired([1.2, 1.4, 1.1, 1.5], [1.0, 1.1, 1.0, 1.1])  # differences 0.2, 0.3, 0.1, 0.4: sd 0.1291, se 0.06455
    assert found["difference"] == pytest.approx(0.25)
    assert found["interval"] == pytest.approx([0.25 - 3.182446 * 0.0645497, 0.25 + 3.182446 * 0.0645497], abs=1e-6)
    assert found["p"] == pytest.approx(0.0304663, abs=1e-6)  # t = 3.873 with 3 degrees of freedom
    assert paired([1.0, None], [1.0, 1.0]) == {"difference": None, "interval": None, "p": 1.0}
    assert mean([1.0, None]) is None


def rows(losses):
    return [{"loss": x, "accuracy": 0.5, "train_loss": x, "trained_parameters": 7} for x in losses]


def test_verdicts(tmp_path):
    base = [1.0, 1.1, 0.9, 1.0, 1.2]
    worse, same = [x + d for x, d in zip(base, (0.1, 0.11, 0.09, 0.1, 0.1), strict=True)], [1.01, 1.09, 0.9, 1.02, 1.18]
    found = {}
    for arm, losses in {"lora": base, "bad": worse, "alike": same, "broken": [1.0, None, 1, 1, 1]}.items():
        curve = [{"rate": rate, "results": rows([2.0 + rate])} for rate in (1.0, 2.0, 4.0)]
        found[arm] = {"curve": curve, "rate": 2.0, "results": rows(losses)}
    found["lora"] |= {"second_rate": 4.0, "second_results": rows([x + 0.5 for x in base])}
    report = report_of(found, range(5))
    assert report["lora_at_second_best_rate"]["difference"] == pytest.approx(0.5)
    verdicts = {arm: row.get("verdict") for arm, row in report["arms"].items()}
    assert verdicts["lora"] is None and verdicts["bad"].startswith("worse than LoRA: loss +0.1000")
    low, high = report["arms"]["alike"]["interval"]
    assert low < 0 < high and verdicts["alike"] == f"no difference above {max(-low, high):.4f} was seen"
    assert verdicts["broken"].startswith("not comparable")
    assert report["arms"]["bad"]["p_holm"] == pytest.approx(3 * report["arms"]["bad"]["p"])
    assert report["arms"]["lora"]["validation_loss_over_middle_three"] == pytest.approx(2 + 7 / 3)
    draw({"toy": report}, tmp_path / "m.png")
    assert (tmp_path / "m.png").stat().st_size > 10_000


def test_the_grid_grows_until_the_best_rate_is_inside(tmp_path):
    class Fake(Runner):
        def run(self, runs):
            return [{"loss": abs(run.rate - 0.16)} for run in runs]

    plan = replace(PLAN, rates=(1e-2, 2e-2))
    curves = tune(Fake({"toy": Toy()}, {"toy": plan}, tmp_path / "r.jsonl", {}, 0), "toy")
    assert sorted(curves["lora"]) == pytest.approx([0.01 * 2**n for n in range(6)])
    assert best_rate(curves["lora"]) == pytest.approx(0.16)
    assert best_rate({1.0: [{"loss": None}], 2.0: [{"loss": 9.0}]}) == 2.0


def numbers(found):
    """All but the seconds."""
    return json.loads(json.dumps(found), object_hook=lambda d: {k: v for k, v in d.items() if k != "cpu_seconds"})


def test_killed_and_started_again_it_ends_in_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(Plan, "longest", 4)
    whole = study(runner(tmp_path / "whole.jsonl"))
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:20]) + lines[20][:40])  # a kill within a line
    again = runner(tmp_path / "cut.jsonl")
    assert again.read == 20
    assert numbers(study(again)) == numbers(whole)
    third = runner(tmp_path / "cut.jsonl")
    assert third.read == len(lines) and numbers(study(third)) == numbers(whole)
    assert runner(tmp_path / "cut.jsonl", replace(PLAN, steps=5)).read == 0  # runs of another plan do not count
    ours = whole["toy"]["lora"]
    assert ours["second_rate"] != ours["rate"] == best_rate({p["rate"]: p["results"] for p in ours["curve"]})
    assert len({result["loss"] for result in ours["results"] + ours["second_results"]}) == 2 * len(PLAN.seeds)


def test_what_enters_the_top_layers_is_computed_once_and_exactly(parts, tmp_path, monkeypatch):
    items = [("what is the shape", "red"), ("a circle of blue colour in this picture", "green"), ("is it", "no")] * 4
    monkeypatch.setattr(mixer_tasks, "docstrings", lambda fewest, most: list(items))
    monkeypatch.setattr(Text, "top_layers", 1)
    task = Text(parts.llm, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(parts.llm, dtype=torch.float32).eval()
    examples = torch.arange(len(items))
    with torch.no_grad():
        logits, answers, owner = task.logits(task.top, examples)
        expected = []
        for number in examples.tolist():
            prompt, answer = task.prompt_and_answer[number]
            expected.append(whole(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-5)
    assert answers.tolist() == [token for _, answer in task.prompt_and_answer for token in answer]
    assert owner.tolist() == [n for n, (_, answer) in enumerate(task.prompt_and_answer) for _ in answer]
    (file,) = tmp_path.glob("hidden-*")
    before = file.stat().st_mtime_ns
    assert Text(parts.llm, tmp_path).digest == task.digest and file.stat().st_mtime_ns == before


def test_docstrings_name_one_module_each():
    items = docstrings(20, 32)
    lines = [line for line, _ in items]
    assert len(set(lines)) == len(lines) > 1000
    counts = {module: sum(m == module for _, m in items) for _, module in items}
    assert all(20 <= count <= 32 for count in counts.values()) and {"argparse", "json", "logging"} & set(counts)


def test_strange_images_are_inverted_and_pale():
    found = strange(torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]), contrast=0.3, noise=0.1, seed=0)
    assert found[0].mean() == pytest.approx(0.65, abs=0.01) and found[1].mean() == pytest.approx(0.35, abs=0.01)
    assert found.std((1, 2, 3)).tolist() == pytest.approx([0.1, 0.1], abs=0.01)


def test_without_the_data_it_says_how_to_get_them(tmp_path):
    with pytest.raises(Refusal, match=r"demo_inputs\.sh"):
        Images(tmp_path, ROOT / "playground/clip-tiny")
    with pytest.raises(Refusal, match=r"demo_inputs\.sh"):
        Text(tmp_path, tmp_path)


def test_a_run_is_named_by_what_tells_it_from_others():
    assert len({Run("toy", "lora", 1e-3, 0, "test"), Run("toy", "lora", 1e-3, 0, "validation")}) == 2
