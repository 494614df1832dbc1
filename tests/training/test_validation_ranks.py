"""Validation on one and two ranks under ZeRO-2 and ZeRO-3: a plain PyTorch loop's losses; killed, the same bytes."""

import json
from pathlib import Path

import pytest

from llava_moslora.files.manifest import read_facts
from support.training_runs import adapter
from support.validation_losses import BOUND, evaluations, reference, write_uneven
from support.zero_runs import configuration, run_successfully, settings

pytestmark = pytest.mark.slow
STEPS = 4
STATE = ["adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json"]


@pytest.fixture(scope="module")
def held_out(parts, tmp_path_factory):
    """Seven records in batches of two: on two ranks one has a last batch, of one record, and the other has none."""
    folder = tmp_path_factory.mktemp("held-out")
    whole = write_uneven(folder, parts, 12)
    records = json.loads(whole.read_text())
    text = [record for record in records if "image" not in record]  # three records: a rank without images
    (folder / "text.json").write_text(json.dumps(text[:3]))
    (folder / "mixed.json").write_text(json.dumps(records[:7]))
    return [folder / "mixed.json", folder / "text.json"]


def evaluating(parts, run: Path, held_out, **changes) -> list[str]:
    same = {"max_steps": STEPS, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    same |= {"per_device_eval_batch_size": 2, "validation_split": 0.2, "learning_rate": 1e-3} | changes
    words = settings(parts, run, **same)
    return [*words, "--eval_data_path", *map(str, held_out)]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("name", "world"), [(None, 0), ("zero2", 1), ("zero2", 2), ("zero3", 1), ("zero3", 2)])
def test_losses_are_those_of_a_plain_loop(warm_server, parts, held_out, tmp_path, name, world, packing):
    run = tmp_path / "run"
    changes = {"deepspeed": configuration(name, tmp_path)} if name else {}
    changes |= {"packing": True, "model_max_length": 128} if packing else {}
    changes |= {"per_device_train_batch_size": 4 // max(world, 1)}
    launch = run_successfully(warm_server, evaluating(parts, run, held_out, **changes), tmp_path / "l", world=world)
    found = evaluations(run)
    assert list(found) == [0, 1, 2, 3, 4] and "step 4 · validation: loss" in launch.printed()
    for step, checkpoint in ((0, None), (2, run / "checkpoint-2"), (4, run / "checkpoint-4")):
        expected = reference(run, parts, checkpoint)
        assert list(expected) == ["data", "mixed", "text", ""]
        for name_of_set, figures in expected.items():
            prefix = f"eval_{name_of_set}_" if name_of_set else "eval_"
            assert found[step][f"{prefix}loss"] == pytest.approx(figures["loss"], rel=BOUND), (step, name_of_set)
            assert found[step][f"{prefix}token_accuracy"] == figures["token_accuracy"]
    assert read_facts(run / "checkpoint-4")["metrics"]["eval_loss"] == found[4]["eval_loss"]


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_a_run_that_is_evaluated_is_the_run_that_is_not(warm_server, parts, held_out, tmp_path, name):
    """Two ranks, bf16, dropout."""
    same = {"deepspeed": configuration(name, tmp_path), "bf16": True}
    run_successfully(warm_server, evaluating(parts, tmp_path / "run", held_out, **same), tmp_path / "l", world=2)
    plain = settings(parts, tmp_path / "plain", max_steps=STEPS, save_steps=2, learning_rate=1e-3, **same)
    plain += ["--validation_split", "0.2", "--eval_on_start", "True"]  # the same records are trained
    run_successfully(warm_server, plain, tmp_path / "p", world=2)
    assert len(evaluations(tmp_path / "plain")) == 1
    for file in [*STATE, "random-0.json", "random-1.json"]:
        last = f"checkpoint-{STEPS}/{file}"
        assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "plain" / last).read_bytes(), file
    assert adapter(tmp_path / "run", STEPS)


KILLS = [("before the evaluation", 1, 0), ("in its middle", 1, 2), ("after it, before the save", 1, 99)]


@pytest.mark.parametrize(("when", "evaluation", "batch"), KILLS, ids=[kill[0] for kill in KILLS])
@pytest.mark.parametrize(("name", "world"), [(None, 0), ("zero2", 2), ("zero3", 2)])
def test_a_killed_run_ends_in_the_same_bytes(
    warm_server, parts, held_out, tmp_path, name, world, when, evaluation, batch
):
    """Killed at the second of three evaluations, after the checkpoint of the first."""
    same = {"eval_steps": 2, "eval_on_start": False, "max_steps": 6, "load_best_model_at_end": True, "resume": True}
    same |= {"deepspeed": configuration(name, tmp_path)} if name else {}
    run_successfully(warm_server, evaluating(parts, tmp_path / "plain", held_out, **same), tmp_path / "p", world=world)
    arguments = evaluating(parts, tmp_path / "run", held_out, **same)
    hook = ["support.validation_losses:kill_in_evaluation", {"evaluation": evaluation, "batch": batch}]
    killed = warm_server.launch(arguments, tmp_path / "killed", world=world, hooks=[hook])
    assert -9 in killed.status and (tmp_path / "run" / "checkpoint-2").is_dir()
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    run_successfully(warm_server, arguments, tmp_path / "resumed", world=world)
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "plain")
    for step in (4, 6):
        for file in [*STATE, *(f"random-{rank}.json" for rank in range(max(world, 1)))]:
            one, other = (tmp_path / run / f"checkpoint-{step}" / file for run in ("run", "plain"))
            assert one.read_bytes() == other.read_bytes(), file
        one, other = (read_facts(tmp_path / run / f"checkpoint-{step}") for run in ("run", "plain"))
        assert (one["metrics"], one["best"]) == (other["metrics"], other["best"])
