"""Validation while training: the losses of a plain PyTorch loop, in a run that is the same run without it."""

import json
import math
import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import DefaultFlowCallback, EarlyStoppingCallback, TrainerControl, TrainerState

from llava_moslora.errors import Refusal
from llava_moslora.files.manifest import read_facts
from llava_moslora.runs.checkpoints import checkpoints, model_checkpoint
from llava_moslora.training import validation
from llava_moslora.training.callbacks.curves import curves_page, smooth
from llava_moslora.training.callbacks.early_stopping import without_improvement
from llava_moslora.training.validation import EvaluationBatches
from support.training_runs import rows, train
from support.validation_losses import BOUND, evaluations, reference, write_uneven

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
STATE = ("adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json", "random-0.json")


@pytest.fixture(scope="module")
def held_out(parts, tmp_path_factory):
    return write_uneven(tmp_path_factory.mktemp("held-out"), parts)


@pytest.fixture(scope="module")
def evaluated(parts, held_out, tmp_path_factory):
    """Four steps with dropout, evaluated on a split and on a file, before the first and after every one."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    settings = EVERY_STEP | {"eval_on_start": True, "eval_data_path": held_out, "validation_split": 0.25}
    train(parts, folder, max_steps=4, save_steps=2, recompute="selective", **settings)
    return folder


def same_state(run, other, step: int) -> None:
    for name in STATE:
        files = [folder / f"checkpoint-{step}" / name for folder in (run, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def close(metrics: dict, expected: dict) -> None:
    several = len(expected) > 2
    for name, figures in expected.items():
        if name and not several:
            continue
        prefix = f"eval_{name}_" if name else "eval_"
        assert metrics[f"{prefix}loss"] == pytest.approx(figures["loss"], rel=BOUND)
        assert metrics[f"{prefix}token_accuracy"] == figures["token_accuracy"]


def test_losses_are_those_of_a_plain_loop(parts, evaluated):
    found = evaluations(evaluated)
    assert list(found) == [0, 1, 2, 3, 4]
    close(found[0], reference(evaluated, parts, None))
    for step in (2, 4):
        expected = reference(evaluated, parts, evaluated / f"checkpoint-{step}")
        assert expected.keys() == {"data", "held_out", ""} and len(found[step]) == 6
        close(found[step], expected)
    assert found[4]["eval_loss"] != pytest.approx(found[0]["eval_loss"], rel=1e-3)


def test_a_run_that_is_evaluated_is_the_run_that_is_not(parts, held_out, tmp_path):
    """Dropout on: one number drawn, or one module left in eval mode, and every later loss is another. The processes
    that read the images end with each evaluation."""
    same = {"max_steps": 3, "save_steps": 3}
    train(parts, tmp_path / "plain", **same)
    same |= {"eval_data_path": held_out, "eval_on_start": True, "dataloader_num_workers": 1}
    train(parts, tmp_path / "evaluated", **same, **EVERY_STEP)
    same_state(tmp_path / "plain", tmp_path / "evaluated", 3)
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "evaluated")
    assert len(evaluations(tmp_path / "evaluated")) == 4 and not multiprocessing.active_children()


def losses_of(run) -> list[float]:
    return [row["loss"] for row in rows(run) if "loss" in row]


def test_packed_records_have_the_same_loss(parts, evaluated, held_out, tmp_path):
    """Before the first step, when both runs are the same model."""
    settings = {"eval_data_path": held_out, "validation_split": 0.25, "packing": True, "model_max_length": 128}
    train(parts, tmp_path / "run", max_steps=1, **EVERY_STEP | settings | {"eval_on_start": True})
    packed, padded = evaluations(tmp_path / "run")[0], evaluations(evaluated)[0]
    assert packed == pytest.approx(padded, rel=BOUND)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_record_is_on_one_rank_and_every_rank_computes_equally_often(world):
    lengths = np.array([5, 1, 4, 2, 9, 7, 3, 8, 6, 10, 11, 12, 13])
    sets = [np.arange(0, 8), np.arange(8, 13)]
    ranks = [EvaluationBatches(sets, lengths, batch_size=2, world_size=world, rank=k).batches for k in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    for number, wanted in enumerate(sets):
        counted = [r for batches in ranks for b in batches if b.counted and b.set_number == number for r in b.rows]
        assert sorted(counted) == wanted.tolist()
    assert all(1 <= len(batch.rows) <= 2 for batches in ranks for batch in batches)
    assert sum(not batch.counted for batches in ranks for batch in batches) < 2 * world  # at most in a set's last
    assert max(lengths[b.rows].max() for b in ranks[0][:1]) == lengths[:8].max()  # the longest first


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("delay", [0, 2, 4.5])
def test_evaluations_are_due_when_transformers_evaluates(strategy, every, delay):
    """In epochs of three steps, of which the last ends after one."""
    nothing = {"logging_strategy": "no", "logging_first_step": False, "save_strategy": "no"}
    args, last = SimpleNamespace(eval_strategy=strategy, eval_delay=delay, **nothing), 7
    for step in range(1, last + 1):
        state = TrainerState(epoch=step / 3, global_step=step, max_steps=last, eval_steps=every)
        control, flow = TrainerControl(), DefaultFlowCallback()
        flow.on_step_end(args, state, control)
        if step % 3 == 0 or step == last:
            flow.on_epoch_end(args, state, control)
        assert validation.is_due(args, state, 3) == control.should_evaluate, step


def test_without_improvement_counts_as_transformers_does():
    random = np.random.default_rng(0)
    for greater in (False, True):
        args = type("Args", (), {"greater_is_better": greater})
        for _ in range(50):
            values, threshold = random.integers(0, 6, 12).tolist(), float(random.integers(0, 3))
            theirs, state, control = EarlyStoppingCallback(99, threshold), TrainerState(), TrainerControl()
            for count, value in enumerate(values, start=1):
                theirs.check_metric_value(args, state, control, value)
                state.best_metric = (max if greater else min)(values[:count])
                assert without_improvement(values[:count], greater, threshold) == theirs.early_stopping_patience_counter


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations with these losses, in turn, and their number."""

    def scripted(*values: float) -> list:
        seen = []

        def metrics(self, sums):
            seen.append(sums)
            return {"eval_loss": values[len(seen) - 1], "eval_token_accuracy": 0.5}

        monkeypatch.setattr(validation.Validation, "_metrics", metrics)
        return seen

    return scripted


STOPPED = {"max_steps": 12, "save_steps": 1, "save_total_limit": 1, "early_stopping_patience": 3}


@pytest.fixture
def stopped(parts, held_out, tmp_path, scripted):
    """Best at step 2; stopped after three evaluations that were no better."""
    scripted(3.0, 1.0, 2.0, 1.5, 1.0)
    settings = EVERY_STEP | STOPPED | {"eval_data_path": held_out, "load_best_model_at_end": True}
    train(parts, tmp_path / "run", **settings)
    return tmp_path / "run", settings


def test_early_stopping_keeps_the_best_next_to_the_newest(stopped):
    run, _ = stopped
    assert [path.name for path in checkpoints(run)] == ["checkpoint-5", "checkpoint-4", "checkpoint-2"]
    facts = {path.name: read_facts(path) for path in checkpoints(run)}
    best = {"step": 2, "metric": "eval_loss", "value": 1.0}
    assert [facts[name]["best"] for name in facts] == [best] * 3
    assert facts["checkpoint-5"]["metrics"] == {"eval_loss": 1.0, "eval_token_accuracy": 0.5}
    assert model_checkpoint(run).name == "checkpoint-2" and model_checkpoint(run, "newest").name == "checkpoint-5"
    assert model_checkpoint(run, "best").name == "checkpoint-2" and model_checkpoint(run, "4").name == "checkpoint-4"
    with pytest.raises(Refusal, match=r"--checkpoint: there is no such checkpoint; found checkpoint-3; expected check"):
        model_checkpoint(run, "checkpoint-3")


def test_a_run_that_stopped_early_stays_stopped(capsys, parts, stopped, scripted):
    run, settings = stopped
    why = "stopped early at step 5 of 12: no better eval_loss in 3 evaluations"
    assert capsys.readouterr().out.splitlines().count(why) == 1
    before = {path: path.read_bytes() for path in run.glob("checkpoint-*/*") if path.is_file()}
    seen = scripted()
    train(parts, run, resume=True, **settings)
    assert not seen and {path: path.read_bytes() for path in run.glob("checkpoint-*/*") if path.is_file()} == before
    assert capsys.readouterr().out.splitlines().count(why) == 1
    changed = settings | {"early_stopping_patience": 9}
    with pytest.raises(Refusal, match=r"K-CHANGED.*early_stopping_patience.*found early_stopping_patience 9"):
        train(parts, run, resume=True, **changed)


def test_the_best_is_exported(stopped, tmp_path, capsys):
    from llava_moslora.export.export import export

    run, _ = stopped
    folder = export(run, tmp_path / "out", ["projector"], prove=False)["projector"]
    assert json.loads((folder / "export.json").read_text())["checkpoint"] == "checkpoint-2"
    assert "checkpoint-2; best by eval_loss until then: checkpoint-2" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert "| validation at this checkpoint | loss 1, token_accuracy 0.5 |" in card and "lowest" not in card
    newest = export(run, tmp_path / "new", ["projector"], prove=False, checkpoint="newest")["projector"]
    assert json.loads((newest / "export.json").read_text())["checkpoint"] == "checkpoint-5"


def test_only_what_is_saved_can_be_the_best(parts, held_out, tmp_path, scripted):
    """Step 3 was better than what was saved at 2 and 4."""
    scripted(5.0, 4.0, 1.0, 3.0)
    settings = EVERY_STEP | {"eval_data_path": held_out, "load_best_model_at_end": True}
    train(parts, tmp_path / "run", max_steps=4, save_steps=2, **settings)
    assert read_facts(model_checkpoint(tmp_path / "run"))["best"] == {"step": 4, "metric": "eval_loss", "value": 3.0}


def test_saving_only_the_best(parts, held_out, tmp_path, scripted):
    scripted(2.0, 3.0, 1.0, 4.0)
    settings = EVERY_STEP | {"eval_data_path": held_out, "save_strategy": "best"}
    train(parts, tmp_path / "run", max_steps=4, **settings)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-1"]


MIXED = [
    # an epoch's last step is evaluated as a step, and saved at the end of the epoch
    ({"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "epoch"}, (5.0, 3.0, 4.0, 2.0), {4: 3.0, 8: 2.0}),
    ({"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "epoch"}, (1.0, 2.0), {4: 1.0, 8: 1.0}),
    # saved as a step, and evaluated at the end of the epoch; nothing but steps 4 and 8 is evaluated
    ({"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 2}, (3.0, 2.0), {4: 3.0, 6: 3.0, 8: 2.0}),
    # evaluated at 3, 6 and at the end, 8
    ({"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 2}, (1.0, 3.0, 2.0),
     {6: 3.0, 8: 2.0}),
    ({"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "epoch"}, (1.0, 3.0, 2.0), {8: 2.0}),
    ({"eval_strategy": "epoch", "save_strategy": "best"}, (2.0, 3.0), {4: 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "values", "best"), MIXED)
def test_the_best_where_steps_and_epochs_are_mixed(parts, held_out, tmp_path, scripted, settings, values, best):
    """Two epochs of four steps: of the steps that are both evaluated and saved, the best, whichever comes first."""
    seen = scripted(*values)
    same = {"num_train_epochs": 2, "max_steps": None, "per_device_train_batch_size": 4, "eval_data_path": held_out}
    train(parts, tmp_path / "run", save_total_limit=9, **same, **settings)
    facts = {path: read_facts(path) for path in checkpoints(tmp_path / "run")}
    assert {f["step"]: f["best"]["value"] for f in facts.values() if "best" in f} == best and len(seen) == len(values)
    newest = facts[model_checkpoint(tmp_path / "run", "newest")]
    assert newest["best"]["step"] == min(s for s, value in best.items() if value == newest["best"]["value"])


def test_evaluations_of_epochs(parts, held_out, tmp_path):
    """16 records, 12 of them trained or so: one evaluation at the end of each epoch and none between."""
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "eval_data_path": held_out, "max_steps": None}
    train(parts, tmp_path / "run", num_train_epochs=2, per_device_train_batch_size=4, **settings)
    assert list(evaluations(tmp_path / "run")) == [4, 8]
    assert "metrics" in read_facts(tmp_path / "run" / "checkpoint-8")


# R1: SIGTERM and SIGINT
@pytest.mark.parametrize("when", ["after the step", "in the evaluation"])
@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_leaves_the_evaluation_to_the_resumed_run(parts, held_out, tmp_path, monkeypatch, when, step):
    """At once: a launcher kills a process 30 seconds after its signal. Step 4 is the last."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4, "eval_data_path": held_out}
    settings |= {"per_device_eval_batch_size": 2, "load_best_model_at_end": True, "resume": True}
    train(parts, tmp_path / "plain", **settings)
    from llava_moslora.training.callbacks.preemption import Preemption

    def signalled(method: str, number: int) -> None:
        original, calls = getattr(Preemption, method), []

        def call(self, args, state, control, **more):
            if state.global_step == step:
                calls.append(None)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGTERM)
            return original(self, args, state, control, **more)

        patch.setattr(Preemption, method, call)

    with monkeypatch.context() as patch:
        signalled(*(("on_step_end", 1) if when == "after the step" else ("on_prediction_step", 2)))
        with pytest.raises(Refusal, match="P-PAUSED"):
            train(parts, tmp_path / "run", **settings)
    assert step not in evaluations(tmp_path / "run")
    assert "metrics" not in read_facts(tmp_path / "run" / f"checkpoint-{step}")
    train(parts, tmp_path / "run", **settings)
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "plain")
    for number in (2, 4):
        same_state(tmp_path / "run", tmp_path / "plain", number)
        one, other = (read_facts(tmp_path / run / f"checkpoint-{number}") for run in ("run", "plain"))
        assert (one["metrics"], one["best"]) == (other["metrics"], other["best"])


def test_a_killed_run_repeats_its_evaluations(parts, evaluated, held_out, tmp_path):
    """Killed in the evaluation of step 4: the newest checkpoint is that of step 2."""
    again = tmp_path / "run"
    shutil.copytree(evaluated, again)
    shutil.rmtree(again / "checkpoint-4")
    settings = EVERY_STEP | {"eval_on_start": True, "eval_data_path": held_out, "validation_split": 0.25}
    settings |= {"data_cache": evaluated.parent / "cache"}
    train(parts, again, max_steps=4, save_steps=2, recompute="selective", resume=True, **settings)
    same_state(again, evaluated, 4)
    assert evaluations(again) == evaluations(evaluated)
    assert [(row["step"], "loss" in row) for row in rows(again)] == [
        (row["step"], "loss" in row) for row in rows(evaluated)
    ]


def test_a_validation_loss_that_is_not_finite_stops_the_run(parts, held_out, tmp_path, monkeypatch):
    original = validation.Validation._metrics
    monkeypatch.setattr(validation.Validation, "_metrics", lambda self, sums: original(self, sums * math.nan))
    with pytest.raises(Refusal, match=r"R-NONFINITE.*the validation loss became NaN or Inf; found held_out"):
        train(parts, tmp_path / "run", eval_data_path=held_out, **EVERY_STEP)
    assert not checkpoints(tmp_path / "run")


def test_the_data_report_counts_what_is_trained_on(evaluated):
    report = json.loads((evaluated / "data/report.json").read_text())
    assert report["records"] == 16 and report["held_out"] > 0 and report["kept"] == 16 - report["held_out"]


def test_curves_show_both_losses_and_the_best(evaluated):
    page = (evaluated / "curves.html").read_text()
    for name in ("training loss, smoothed", "eval_loss", "eval_data_loss", "eval_held_out_token_accuracy"):
        assert name in page
    assert page.count("<svg") == 2 and 'class="mark"' in page and "://" not in page
    assert f"best checkpoint: checkpoint-{read_facts(evaluated / 'checkpoint-4')['best']['step']}" in page


def test_curves_of_any_log():
    assert smooth([2.0]) == [pytest.approx(2.0)] and smooth([1.0, 1.0, 1.0]) == [pytest.approx(1.0)] * 3
    assert "nothing was logged yet" in curves_page([], None, "run")
    for value in (0.0, 2.7182818284590455, 1e-13):  # the same at every step: a learning rate of 0
        assert "<svg" in curves_page([{"step": step, "loss": value} for step in (1, 2, 3)], None, "run")
    many = [{"step": k, "loss": 1 / k} for k in range(1, 5001)]
    page = curves_page([*many, {"step": 5001, "loss": "nan"}, {"step": 5000, "eval_loss": 0.5}], None, "a <run>")
    assert len(page) < 80_000 and "a &lt;run&gt;" in page and "eval_loss" in page


def test_tensorboard_has_the_evaluations(evaluated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(evaluated / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("eval/held_out_loss")}
    assert shown == {step: pytest.approx(row["eval_held_out_loss"]) for step, row in evaluations(evaluated).items()}
