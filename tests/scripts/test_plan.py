"""scripts/plan.py: recipes, flags, run folders; its exit statuses, and one line for each wrong input."""

import html
import json
import math
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
from transformers import CLIPVisionConfig, LlamaConfig

from llava_moslora.errors import Refusal
from llava_moslora.planning.states import STATE_BYTES
from llava_moslora.training.compatible import PER_PARAMETER, PER_WEIGHT
from support.launching import ROOT
from support.planned import CLIP_L_336, LLAMA_3_8B
from support.run_folders import edit_record
from support.tiny import write_gemma2

SCRIPT = str(ROOT / "scripts" / "plan.py")
RECIPE = str(ROOT / "scripts" / "llama3_8b_moslora.sh")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Configurations of the real parts, and no weights."""
    folder = tmp_path_factory.mktemp("planned")
    LlamaConfig(**LLAMA_3_8B, max_position_embeddings=8192).save_pretrained(folder / "llm")
    CLIPVisionConfig(**CLIP_L_336).save_pretrained(folder / "clip")
    return folder


@pytest.fixture
def plan(folders, monkeypatch, capsys):
    """``plan(*arguments, **environment)``: the script's exit status and what it prints."""

    def run(*arguments, **environment) -> SimpleNamespace:
        for name, value in ({"LLM": folders / "llm", "TOWER": folders / "clip"} | environment).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
        monkeypatch.chdir(ROOT)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(SCRIPT)["main"]()
        return SimpleNamespace(status=ended.value.code, stdout=capsys.readouterr().out)

    return run


def test_a_recipe_is_planned_from_configurations_alone(plan):
    done = plan("--config", RECIPE, "--gpu", "h100-80", "--gpus", 4, "--records", 665_298, "--json")
    assert done.status == 0
    found = json.loads(done.stdout)
    assert found["gpus"] == 4 and found["steps"] == 10_396 and found["fits"] is True
    assert sum(found["memory"].values()) == found["peak"]
    assert found["hours"][0] < found["hours"][1]


def test_flags_behind_a_recipe_win_and_what_does_not_fit_is_status_6(plan):
    small = ["--config", RECIPE, "--gpu", "l4", "--gpus", 1]
    done = plan(*small)
    assert done.status == 6 and done.stdout.startswith("does not fit on 1 × L4")
    done = plan(*small, "--bits", 4, "--per_device_train_batch_size", 1)
    assert done.status == 0


def test_a_range_that_contains_the_cards_size_is_status_7(plan):
    given = ["--gpu", "a100-40", "--gpus", 1, "--recompute", "every:2", "--per_device_train_batch_size", 4]
    done = plan("--config", RECIPE, *given, "--tokens", 2048, "--labels", 200, "--json")
    found = json.loads(done.stdout)
    assert done.status == 7 and found["fits"] is None and found["verdict"].startswith("may not fit on 1 × A100")
    assert found["device"][0] <= found["capacity"] < found["device"][1]


def test_suggestions_and_bars(plan):
    done = plan("--config", RECIPE, "--gpu", "h100-80", "--tokens", 900, "--labels", 130, "--suggest")
    assert done.status == 0
    assert "█" in done.stdout and "fastest that fits" in done.stdout and "--recompute" in done.stdout


def test_recompute_auto_plans_what_it_chooses(plan, folders, tmp_path):
    """In flags, or in a file of flags; the plan is that of the way itself."""
    given = ["--config", RECIPE, "--gpu", "a100-40", "--gpus", 4, "--json", "--recompute"]
    auto = json.loads(plan(*given, "auto").stdout)
    itself = json.loads(plan(*given, auto["recompute"]).stdout)
    assert auto["chosen"].startswith(f"--recompute auto: {auto['recompute']}, planned ") and itself["chosen"] is None
    assert {**auto, "chosen": None} == itself
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {folders / 'llm'}\nvision_tower: {folders / 'clip'}\nrecompute: auto\nbf16: true\n"
        f"data_path: unknown\noutput_dir: planned\ndeepspeed: {ROOT / 'zero_configs' / 'zero1.json'}\n"
    )
    said = plan("--config", tmp_path / "run.yaml", "--gpu", "h200").stdout.splitlines()[1]
    assert said.startswith("--recompute auto: none, planned ") and said.endswith("; no mode is faster")


def test_a_run_folder_and_its_prepared_data(plan, parts, tmp_path):
    """A run of the tiny parts, planned again from its run.json, with the lengths that its data have."""
    from support.training_runs import train

    run = tmp_path / "run"
    train(parts, run, max_steps=1)
    done = plan("--config", run, "--gpu", "a100-80", "--json")
    assert done.status == 0
    found = json.loads(done.stdout)
    assert found["records"] == "the prepared data" and found["steps"] == 1

    def as_started_before_a_flag_and_elsewhere(record):
        training = record["settings"]["training"]
        del training["lora_plus_ratio"], training["riemannian"]
        training["deepspeed"], record["folder"] = "zero.json", str(tmp_path)

    (tmp_path / "zero.json").write_text((ROOT / "zero_configs" / "zero2.json").read_text())
    edit_record(run, as_started_before_a_flag_and_elsewhere)
    assert plan("--config", run, "--gpu", "a100-80").status == 0


def test_bare_flags(plan, folders):
    given = ["--model_name_or_path", folders / "llm", "--vision_tower", folders / "clip", "--bf16", "True"]
    given += ["--deepspeed", ROOT / "zero_configs" / "zero1.json", "--per_device_train_batch_size", 1]
    given += ["--recompute", "full", "--tokens", 2048, "--labels", 200]
    done = plan("--gpu", "h100-80", *given)
    assert done.status == 0
    assert "1 × 2048 tokens, 1 images, 200 labels" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "h100-81", "--config", RECIPE], "--gpu: unknown GPU; found h100-81"),
        (["--gpu", "h100", "--config", RECIPE], "fix: did you mean h100-80 | h100-pcie | h100-nvl?"),
        (["--gpu", "4090", "--config", RECIPE], "fix: did you mean rtx4090?"),
        (["--gpu", "A100", "--config", RECIPE, "--gpus", "0"], "--gpus: out of range; found 0"),
        (["--gpu", "h100-80", RECIPE], f"a value without a flag; found {RECIPE}; fix: give it as --config {RECIPE}"),
        (["--gpu", "h100-80", "--gpus", "0"], "--gpus: out of range; found 0"),
        (["--config", RECIPE], "--gpu: missing flag"),
        (["--gpu", "h100-80"], "--model_name_or_path"),
        (["--gpu", "h100-80", "--config", "missing.yaml"], "missing.yaml:--config: no such file"),
        (["--gpu", "h100-80", "--config", "missing.sh"], "missing.sh:--config: no such file"),
        (["--gpu", "h100-80", "--config", str(ROOT / "docs")], "not a run folder"),
        (["--gpu", "h100-80", "--config", str(ROOT / "scripts" / "recipe_defaults.sh")], "does not start training"),
        (["--gpu", "h100-80", "--gpus", "3", "--config", RECIPE], "--global_batch_size: not a multiple"),
        (["--gpu", "h100-80", "--config", RECIPE, "--recompute", "some"], "--recompute: unknown mode"),
        (["--gpu", "h100-80", "--config", RECIPE, "--tokens", "0"], "--tokens: out of range"),
    ],
)
def test_a_wrong_input_is_refused(plan, arguments, says):
    with pytest.raises(Refusal) as refused:
        plan(*arguments)
    assert says in str(refused.value) and refused.value.exit_status == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--torch_compile", "True"], "--torch_compile: not supported by the planner: torch.compile itself"),
        (["--use_liger_kernel", "True"], "--use_liger_kernel: not supported by the planner"),
        (["--deepspeed", "nvme.json"], "zero_optimization.offload_param.device: not supported by the .*found nvme"),
    ],
)
def test_what_the_planner_cannot_say_is_status_7_in_one_line(plan, tmp_path, flags, says):
    nvme = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}
    (tmp_path / "nvme.json").write_text(json.dumps({"zero_optimization": nvme}))
    flags = [str(tmp_path / word) if word == "nvme.json" else word for word in flags]
    with pytest.raises(Refusal, match=says) as refused:
        plan("--config", RECIPE, "--gpu", "h100-80", *flags)
    assert refused.value.exit_status == 7 and refused.value.line().startswith("error[N-PLAN] ")
    assert "fix: plan with" in refused.value.line()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--optim", "galore_adamw"], "--optim: this optimizer's state cannot be saved; found galore_adamw"),
        (["--optim", "adafactor"], "ZeRO concatenates parameters, and cannot partition this optimizer's state"),
        (["--method", "loha", "--bits", "4"], "--method loha, --bits 4: PEFT computes LoHa's factors"),
        (["--method", "loha", "--deepspeed", "zero_configs/zero3.json"], "--method loha, --deepspeed zero_con"),
    ],
)
def test_what_a_training_would_refuse_is_not_planned(plan, flags, says):
    with pytest.raises(Refusal, match=says) as refused:
        plan("--config", RECIPE, "--gpu", "h100-80", *flags)
    assert refused.value.exit_status == 2


def test_the_state_of_every_optimizer_that_can_be_trained_with_is_counted():
    assert set(STATE_BYTES) == {*PER_WEIGHT, *PER_PARAMETER}


def test_a_recipe_whose_folders_are_missing_is_refused(plan):
    with pytest.raises(Refusal, match="nowhere/llm:--model_name_or_path: no such folder"):
        plan("--gpu", "h100-80", "--config", RECIPE, LLM="nowhere/llm")


def test_an_llm_that_is_not_trained_is_not_planned(plan, tmp_path):
    with pytest.raises(Refusal, match=r"C-MODEL\] .*final_logit_softcapping"):
        plan("--gpu", "h100-80", "--config", RECIPE, LLM=write_gemma2(tmp_path))


def test_a_page_with_bars(plan, tmp_path):
    """Every part has a bar as wide as its share of the card; nothing is fetched, no script runs."""
    done = plan("--config", RECIPE, "--gpu", "h100-80", "--tokens", 900, "--json", "--html", tmp_path / "plan.html")
    found, text = json.loads(done.stdout), (tmp_path / "plan.html").read_text()
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    widths = [float(w) for w in re.findall(r'<rect class=\w+ x="0" y="\d+" width="([\d.]+)"', text)]
    sizes = [*found["memory"].values(), found["device"][1] - found["peak"]]
    shares = [1000 * size / max(found["capacity"], found["device"][1]) for size in sizes]
    assert widths[-1] == pytest.approx(1000 * found["capacity"] / max(found["capacity"], found["device"][1]), abs=0.1)
    assert widths[-1 - len(shares) : -1] == pytest.approx(shares, abs=0.06)
    assert html.unescape(text).count(found["verdict"]) == 2


def test_text_alone_is_planned(plan):
    recipe = ROOT / "scripts" / "llama3_8b_commonsense_moslora.sh"
    done = plan("--config", recipe, "--gpu", "a100-80", "--records", 170_420, "--json")
    found = json.loads(done.stdout)
    assert done.status == 0 and found["steps"] == 3 * math.ceil(170_420 / 16)
    assert not any("vision" in name or "projector" in name for name in found["memory"])
