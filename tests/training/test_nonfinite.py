"""A run that has gone wrong stops, says on which records, and leaves nothing behind that a later run would read."""

import json
from types import SimpleNamespace

import pytest
import torch

import scripts.train_vit_llm as script
from llava_moslora.errors import Refusal
from llava_moslora.models.adapt import add_adapters
from llava_moslora.training.nonfinite import NONFINITE_FILE, FiniteCheck, check_labels, out_of_memory
from support.launching import LAUNCHER, flags, free_port, run
from support.training_runs import broken, train

# Run by a launcher: the script, with one rank's loss or gradient turned into NaN at the second step.
BROKEN_RUN = """
import sys
import scripts.train_vit_llm as script
from llava_moslora.errors import run_script
from llava_moslora.models.adapt import add_adapters
from support.training_runs import broken

sys.argv = [word for word in sys.argv if not word.startswith("--local_rank")]
script.add_adapters = lambda *args: broken(add_adapters(*args), "{where}", only_rank=1)
run_script(script.main)
"""


# R8: NaN or Inf
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run(parts, tmp_path, monkeypatch, where):
    monkeypatch.setattr(script, "add_adapters", lambda *args: broken(add_adapters(*args), where))
    folder = tmp_path / "run"
    with pytest.raises(Refusal, match=rf"the {where} became NaN or Inf.* at step 1; nothing was saved.*nonfinite.json"):
        train(parts, folder, max_steps=3, save_steps=1)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    dump = json.loads((folder / NONFINITE_FILE).read_text())
    assert dump["step"] == 1 and len(dump["batches"]) == 1
    batch = dump["batches"][0]
    assert len(batch["records"]) == 2 and set(batch["records"]) <= set(range(16))
    assert (batch["loss"] == "nan") == (where == "loss")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "zero", "bf16"),
    [
        ("gradient", "zero0", True),
        ("gradient", "zero1", True),
        ("gradient", "zero2", True),
        ("gradient", "zero2", False),
        ("gradient", "zero3", True),
        ("loss", "zero1", True),
        ("loss", "zero2", True),
        ("loss", "zero3", True),
    ],
)
def test_deepspeed_does_not_go_on_without_a_step(parts, tmp_path, where, zero, bf16):
    """It leaves a step with a NaN gradient out, or in bf16 under ZeRO-2 (and, with our step, ZeRO-1) takes it, and
    continues."""
    (tmp_path / "broken.py").write_text(BROKEN_RUN.replace("{where}", where))
    folder = tmp_path / "run"
    words = flags(parts, folder, deepspeed=f"zero_configs/{zero}.json", max_steps=3, save_steps=1, bf16=bf16)
    done = run([*LAUNCHER, "--master_port", free_port(), tmp_path / "broken.py", *words], PYTHONPATH=".:tests")
    assert done.returncode == 5, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if "error[R-NONFINITE]" in line]
    taken = bf16 and zero in ("zero1", "zero2")
    said = "gradient norm" if taken else "DeepSpeed skipped the update"
    if where == "loss":
        said = "the loss became NaN or Inf at step 1"
    assert lines and said in lines[0]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    batches = json.loads((folder / NONFINITE_FILE).read_text())["batches"]
    assert [batch["rank"] for batch in batches] == [0, 1]
    assert [batch["loss"] == "nan" for batch in batches] == [False, where == "loss"]


LATER = {  # what is done after the second step, the broken one, where a log comes later
    "save": {"save_steps": 1, "max_steps": 3},
    "evaluate": {"eval_strategy": "steps", "eval_steps": 2, "validation_split": 0.25, "save_steps": 1, "max_steps": 5},
    "health": {"health_steps": 2, "save_steps": 1, "max_steps": 5},
    "samples": {"sample_steps": 2, "save_steps": 1, "max_steps": 5},
    "end": {"max_steps": 2, "save_strategy": "no"},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LATER)
def test_a_step_that_was_only_launched_is_looked_at_before_its_weights_are_used(parts, tmp_path, what):
    """ZeRO-1 in bf16, logging every ten steps: nothing of the step is logged, saved, evaluated, measured or asked."""
    (tmp_path / "broken.py").write_text(BROKEN_RUN.replace("{where}", "gradient"))
    folder, settings = tmp_path / "run", {"logging_steps": 10, "bf16": True} | LATER[what]
    if what == "samples":
        record = {"id": "0", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]}
        (tmp_path / "samples.json").write_text(json.dumps([record]))
        settings["sample_questions"] = tmp_path / "samples.json"
    words = flags(parts, folder, deepspeed="zero_configs/zero1.json", **settings)
    done = run([*LAUNCHER, "--master_port", free_port(), tmp_path / "broken.py", *words], PYTHONPATH=".:tests")
    assert done.returncode == 5, done.stderr[-2000:]
    assert "the gradient became NaN or Inf (gradient norm nan) at step 1" in done.stderr
    kept = [] if what == "end" else ["checkpoint-1"]
    assert [path.name for path in folder.glob("checkpoint-*")] == kept
    rows = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert all(row.get("step", 0) < 2 for row in rows), rows


def engine(*, skipped: int, scale: float, fp16: bool = True, dynamic: bool = True):
    scaler = SimpleNamespace(dynamic=dynamic, cur_scale=scale, min_scale=1.0)
    return SimpleNamespace(
        skipped_steps=skipped, fp16_enabled=lambda: fp16, optimizer=SimpleNamespace(loss_scaler=scaler)
    )


def guard(folder) -> FiniteCheck:
    guard = FiniteCheck(folder)
    guard.begin_step([[3, 4]])
    guard.add_loss(torch.tensor(1.5))
    return guard


def test_a_loss_is_looked_at_with_its_step_and_its_records_are_named(tmp_path):
    """Of the micro-batch it belongs to, also where the gradient is finite; until then its value is never asked for."""
    watch = FiniteCheck(tmp_path)
    watch.begin_step([[1, 2], [3, 4], [5, 6]])
    watch.add_loss(torch.empty((), device="meta"))  # has no value to ask for
    watch.losses.clear()
    for loss in (1.5, float("inf"), 2.5):
        watch.add_loss(torch.tensor(loss))
    with pytest.raises(Refusal, match=r"the loss became NaN or Inf at step 7.*found loss inf on records 3, 4;"):
        watch.check(7, torch.tensor(1.0), None, {})
    batches = json.loads((tmp_path / NONFINITE_FILE).read_text())["batches"]
    assert [(batch["records"], batch["loss"]) for batch in batches] == [
        ([1, 2], "1.5"), ([3, 4], "inf"), ([5, 6], "2.5")
    ]  # fmt: skip
    with pytest.raises(Refusal, match="the loss became NaN or Inf"):  # and not that the gradient overflows
        watch.loss_scale_exhausted(7)


def test_a_nan_loss_stops_the_search_for_fp16s_loss_scale_too(tmp_path):
    watch = guard(tmp_path)
    watch.add_loss(torch.tensor(float("nan")))
    watch.records.append([8])
    with pytest.raises(Refusal, match=r"the loss became NaN or Inf.*records 8;"):
        watch.check(7, -1.0, engine(skipped=1, scale=2**15), {})


def test_finite_steps_give_the_norm_as_a_number(tmp_path):
    assert guard(tmp_path).check(7, torch.tensor(2.5), None, {}) == 2.5
    assert guard(tmp_path).check(7, 2.5, engine(skipped=0, scale=1), {}) == 2.5
    assert guard(tmp_path).check(7, None, engine(skipped=0, scale=1), {"a": torch.ones(2)}) is None


def launched(folder, norm: float, *losses: float) -> FiniteCheck:
    """A step that has been launched, and is not yet looked at."""
    watch = FiniteCheck(folder)
    watch.begin_step([[10 + i] for i in range(len(losses))])
    for loss in losses:
        watch.add_loss(torch.tensor(loss))
    assert torch.equal(watch.check_later(7, torch.tensor(norm)), torch.tensor(norm)) or norm != norm
    watch.require_checked()
    return watch


NAN = float("nan")


@pytest.mark.parametrize(
    ("norm", "losses", "message"),
    [
        (1.0, (1.5, NAN), r"the loss became NaN or Inf at step 7.*found loss nan on records 11;"),
        (NAN, (1.5, 2.5), r"the gradient became NaN or Inf \(gradient norm nan\) at step 7.*on records 10, 11;"),
        (float("inf"), (1.5,), r"the gradient became NaN or Inf \(gradient norm inf\) at step 7.*on records 10;"),
    ],
)
@pytest.mark.parametrize("by", ["the next step", "a save"])
def test_a_step_that_was_only_launched_is_looked_at_later(tmp_path, norm, losses, message, by):
    """With its own number and records, though the next step has been launched already."""
    watch = launched(tmp_path, norm, *losses)
    if by == "the next step":
        watch.begin_step([[98], [99]])
        watch.add_loss(torch.tensor(3.5))
    with pytest.raises(Refusal, match=message):
        watch.check_later(8, torch.tensor(1.0)) if by == "the next step" else watch.settle()
    dump = json.loads((tmp_path / NONFINITE_FILE).read_text())
    assert dump["step"] == 7 and [batch["records"] for batch in dump["batches"]] == [
        [10 + i] for i in range(len(losses))
    ]


def test_a_finite_step_that_was_only_launched_is_settled_once(tmp_path):
    watch = launched(tmp_path, 2.5, 1.5)
    watch.settle()
    watch.settle()
    assert watch.launched is None and not (tmp_path / NONFINITE_FILE).exists()


def test_a_step_that_was_not_checked_is_noticed(tmp_path):
    watch = guard(tmp_path)
    with pytest.raises(AssertionError, match="this step's loss and gradient were not checked"):
        watch.require_checked()
    watch.check(7, 2.5, None, {})
    watch.require_checked()
    watch.begin_step([[5, 6], [7, 8]])
    watch.add_loss(torch.tensor(1.5))
    watch.check(8, 2.5, None, {})
    with pytest.raises(AssertionError, match="not checked"):  # nor was the second micro-batch's loss
        watch.require_checked()


def test_a_trainer_that_checks_nothing_stops_before_it_saves(parts, tmp_path, monkeypatch):
    """As if an upgrade of transformers had stopped calling the method in which the check is made."""
    monkeypatch.setattr(script.MosLoraTrainer, "_get_grad_norm", lambda *_, **__: 1.0)
    with pytest.raises(AssertionError, match="not checked"):
        train(parts, tmp_path / "run", max_steps=2, save_steps=1)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_search_for_fp16s_loss_scale_goes_on(tmp_path):
    watch = guard(tmp_path)
    watch.check(7, float("inf"), engine(skipped=1, scale=2**15), {})
    watch.check(8, 1.0, engine(skipped=1, scale=2**15), {})  # a step that was taken
    assert not (tmp_path / NONFINITE_FILE).exists()


@pytest.mark.parametrize(
    "skipping",
    [
        {"scale": 1.0},  # nowhere left to go
        {"scale": 2**15, "dynamic": False},  # a fixed scale is not searched for
        {"scale": 2**15, "fp16": False},
    ],
)
def test_other_steps_left_out_stop_the_run(tmp_path, skipping):
    with pytest.raises(Refusal, match=r"DeepSpeed skipped the update.*records 3, 4.*lower --learning_rate"):
        guard(tmp_path).check(7, 1.0, engine(skipped=1, **skipping), {})


def test_float16_at_its_smallest_loss_scale(tmp_path):
    with pytest.raises(Refusal, match="overflows float16 at the smallest loss scale at step 7"):
        guard(tmp_path).loss_scale_exhausted(7)


def test_without_a_norm_the_weights_are_looked_at(tmp_path):
    fine, bad = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.tensor([1.0, float("nan")]))
    guard(tmp_path).check(7, None, engine(skipped=0, scale=1), {"a": fine})
    with pytest.raises(Refusal, match="the gradient became NaN or Inf"):
        guard(tmp_path).check(7, None, engine(skipped=0, scale=1), {"a": fine, "b": bad})


def test_rounded_rotary_frequencies_stop_the_run(parts, tmp_path, monkeypatch):
    """Older versions of DeepSpeed cast the model's buffers with its parameters."""

    def cast(*args):
        model = add_adapters(*args)
        model.base_model.model.model.language_model.rotary_emb.bfloat16()
        return model

    monkeypatch.setattr(script, "add_adapters", cast)
    with pytest.raises(
        Refusal, match=r"C-DEEPSPEED\] .*rotary_emb.inv_freq: .*found torch.bfloat16; expected torch.fl"
    ):
        train(parts, tmp_path / "run")


def test_a_batch_without_labels_is_refused():
    check_labels(1, [3])
    with pytest.raises(Refusal, match=r"D-LABELS.*no token of this batch has a label; found records 3, 9; fix: "):
        check_labels(0, [3, 9])


# C7: nothing to train
def test_nothing_to_train_is_refused(parts, tmp_path, monkeypatch):
    with pytest.raises(Refusal, match="--lora_r: no adapter to train"):
        train(parts, tmp_path / "run", lora_r=0, vision_lora_r=0)
    monkeypatch.setattr(script, "add_adapters", lambda *args: add_adapters(*args).requires_grad_(False))
    with pytest.raises(Refusal, match="--lora_r: nothing to train; fix: train an adapter, or stage 1"):
        train(parts, tmp_path / "other")


# R5: out of memory
def test_lack_of_memory_in_one_line_with_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 23 * 2**30)
    refusal = out_of_memory(8)
    assert refusal.exit_status == 4
    assert "found 24.0 GiB in total, 23.0 GiB peak, 1.0 GiB free" in refusal.line()
    assert "--per_device_train_batch_size (now 8)" in refusal.line()
