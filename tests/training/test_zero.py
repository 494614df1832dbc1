"""Every ZeRO configuration on two ranks: the losses of plain PyTorch, resume in the same bytes, no rank waiting."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.tiny import write_llm, write_projector
from support.warm_server import Launch
from support.zero_runs import STEPS, configuration, run_successfully, settings

pytestmark = pytest.mark.slow
NAMES = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
# Clipping off: DeepSpeed rounds the factor by which it clips in another place than torch.
EXACT = {"lora_dropout": 0, "vision_lora_dropout": 0, "max_grad_norm": 0, "learning_rate": 1e-3}
EXACT |= {"mm_projector_lr": 1e-4}  # a group of parameters of its own
BOUND = 5e-6  # relative, of a loss in float32: sums in another order
STATE = ["adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json"]


def losses(run: Path, steps: int = STEPS) -> list[float]:
    state = json.loads((run / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def order(launch: Launch) -> list[set[int]]:
    """The records of every step, of all ranks."""
    steps: dict[int, set[int]] = {}
    for rank in range(launch.world):
        for row in launch.micro_batches(rank):
            steps.setdefault(row["step"], set()).update(row["records"])
    return [steps[step] for step in sorted(steps)]


@pytest.fixture(scope="module")
def plain(warm_server, parts, tmp_path_factory) -> tuple[Path, Launch]:
    """One process without DeepSpeed, global batches of four, float32, no dropout."""
    folder = tmp_path_factory.mktemp("plain")
    arguments = settings(parts, folder / "run", **EXACT, per_device_train_batch_size=4)
    return folder / "run", run_successfully(warm_server, arguments, folder / "launch")


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2"])
def test_one_rank_computes_the_bits_of_plain_pytorch(warm_server, parts, plain, tmp_path, name):
    """Losses and weights. (Adam's moments of the smallest mixers may differ in their last bit: ZeRO flattens tensors
    into one, and torch rounds the few numbers at a tensor's end in another instruction than those before.)"""
    run = tmp_path / "run"
    config = configuration(name, tmp_path)
    arguments = settings(parts, run, deepspeed=config, **EXACT, per_device_train_batch_size=4)
    run_successfully(warm_server, arguments, tmp_path / "launch", world=1)
    assert losses(run) == losses(plain[0])
    last = f"checkpoint-{STEPS}/{STATE[0]}"
    assert (run / last).read_bytes() == (plain[0] / last).read_bytes()


@pytest.mark.parametrize(("name", "world"), [("zero3", 1), *((name, 2) for name in NAMES)])
def test_losses_are_those_of_plain_pytorch(warm_server, parts, plain, tmp_path, name, world):
    run = tmp_path / "run"
    arguments = settings(
        parts, run, deepspeed=configuration(name, tmp_path), **EXACT, per_device_train_batch_size=4 // world
    )
    launch = run_successfully(warm_server, arguments, tmp_path / "launch", world=world)
    assert order(launch) == order(plain[1])
    assert losses(run) == pytest.approx(losses(plain[0]), rel=BOUND)


def test_what_the_file_leaves_out_is_taken_from_the_flags(warm_server, parts, tmp_path):
    """Clipping that is felt, accumulation and bf16, with all keys in the file and with none of them."""
    flags = {"bf16": True, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "optim": "sgd", "warmup_steps": 0}
    flags |= {"learning_rate": 0.1, "max_steps": 3, "save_steps": 3}
    (tmp_path / "short.json").write_text('{"zero_optimization": {"stage": 2}}')
    for name, file in {"whole": configuration("zero2", tmp_path), "short": tmp_path / "short.json"}.items():
        arguments = settings(parts, tmp_path / name / "run", **flags, deepspeed=file)
        run_successfully(warm_server, arguments, tmp_path / f"launch-{name}", world=2)
    whole, short = (tmp_path / name / "run" / "checkpoint-3" / STATE[0] for name in ("whole", "short"))
    assert whole.read_bytes() == short.read_bytes()


def test_a_siglip_tower_learns_the_same_under_zero3(warm_server, parts, tmp_path):
    """Its pooling head is gone before ZeRO-3 meets it; batches with and without images on either rank."""
    same = EXACT | {"vision_tower": parts.siglip, "max_steps": 8, "save_steps": 8}
    plain, zero3 = tmp_path / "plain" / "run", tmp_path / "zero3" / "run"
    run_successfully(warm_server, settings(parts, plain, **same, per_device_train_batch_size=4), tmp_path / "launch")
    same |= {"deepspeed": configuration("zero3", tmp_path), "per_device_train_batch_size": 2}
    run_successfully(warm_server, settings(parts, zero3, **same), tmp_path / "launch3", world=2)
    assert losses(zero3, 8) == pytest.approx(losses(plain, 8), rel=BOUND)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_does_not_change_the_losses(warm_server, parts, plain, tmp_path, batch, accumulation):
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    arguments = settings(parts, tmp_path / "run", **EXACT, **split)
    launch = run_successfully(warm_server, arguments, tmp_path / "launch")
    assert order(launch) == order(plain[1])
    assert losses(tmp_path / "run") == pytest.approx(losses(plain[0]), rel=BOUND)


def test_a_found_cache_changes_nothing(warm_server, parts, plain, tmp_path):
    cache = plain[0].parent / "cache"
    assert cache.is_dir()
    run = tmp_path / "run"
    arguments = settings(parts, run, **EXACT, per_device_train_batch_size=4, data_cache=cache)
    run_successfully(warm_server, arguments, tmp_path / "launch")
    for file in STATE[:2]:
        last = f"checkpoint-{STEPS}/{file}"
        assert (run / last).read_bytes() == (plain[0] / last).read_bytes(), file


@pytest.mark.parametrize(
    ("name", "optim"),
    [*((n, "adamw_torch_fused") for n in NAMES), ("zero0", "adamw_bnb_8bit"), ("zero2", "lion_32bit")],
)
def test_killed_run_ends_in_the_same_bytes(warm_server, parts, tmp_path, name, optim):
    """bf16 and dropout; killed after its first checkpoint, resumed by the same command."""
    same = {"deepspeed": configuration(name, tmp_path), "bf16": True, "mm_projector_lr": 1e-3, "max_steps": 6}
    same |= {"save_steps": 3, "resume": True, "data_cache": tmp_path / "cache", "optim": optim}
    run_successfully(warm_server, settings(parts, tmp_path / "run", **same), tmp_path / "launch", world=2)
    killed = warm_server.launch(settings(parts, tmp_path / "again", **same), tmp_path / "first", world=2, at_step=4)
    assert killed.status == [-9, -9]
    second = run_successfully(warm_server, settings(parts, tmp_path / "again", **same), tmp_path / "second", world=2)
    assert second.micro_batches()[0]["step"] == 4
    for file in [*STATE, "random-0.json", "random-1.json"]:
        last = f"checkpoint-6/{file}"
        assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "again" / last).read_bytes(), file


@pytest.mark.parametrize("world", [1, 2])
def test_stage_0_in_16_bits_learns_as_zero2(warm_server, parts, tmp_path, world):
    """DeepSpeed's optimizer of that stage takes a step before the first gradient: Adam's count would be one ahead,
    which its first steps show most."""
    found = {}
    for name in ("zero0", "zero2"):
        changes = {**EXACT, "bf16": True, "max_steps": 6, "save_steps": 6, "weight_decay": 0.1, "warmup_steps": 0}
        changes |= {"deepspeed": configuration(name, tmp_path), "per_device_train_batch_size": 4 // world}
        run = tmp_path / name / "run"
        run_successfully(warm_server, settings(parts, run, **changes), tmp_path / f"launch-{name}", world=world)
        found[name] = losses(run, 6), load_file(run / "checkpoint-6" / STATE[0])
    assert found["zero0"][0] == pytest.approx(found["zero2"][0], rel=1e-6 if world == 1 else 2e-3)
    for name, tensor in found["zero0"][1].items():  # float32 masters: bfloat16 would have lost most of their digits
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float()), name
        if world == 1:
            torch.testing.assert_close(tensor, found["zero2"][1][name], rtol=1e-5, atol=1e-7)


# K11: resumed on another number of ranks or ZeRO stage
def test_other_stages_and_world_sizes_resume_the_run(warm_server, parts, plain, tmp_path):
    """ZeRO-3 on two ranks, plain PyTorch on one, ZeRO-2 on two, ZeRO-1 on one: the plain run's records and losses."""
    resume_in_turn(warm_server, parts, plain, tmp_path, [("zero3", 2), (None, 0), ("zero2", 2), ("zero1", 1)])


def test_stage_0_and_zero2_resume_each_other(warm_server, parts, plain, tmp_path):
    resume_in_turn(warm_server, parts, plain, tmp_path, [("zero0", 2), ("zero2", 1), ("zero0", 1), ("zero2", 2)])


def resume_in_turn(warm_server, parts, plain, tmp_path, stages: list[tuple[str | None, int]]) -> None:
    run = tmp_path / "run"
    seen = []
    for number, (name, world) in enumerate(stages, start=1):
        config = None if name is None else configuration(name, tmp_path)
        arguments = settings(
            parts,
            run,
            **EXACT,
            deepspeed=config,
            resume=True,
            save_steps=6,
            per_device_train_batch_size=4 // max(world, 1),
        )
        how = {"at_step": 6 * number + 2} if number < len(stages) else {}
        launch = warm_server.launch(arguments, tmp_path / f"launch{number}", world=world, **how)
        assert set(launch.status) == ({-9} if how else {0}), launch.printed()[-3000:]
        seen[6 * (number - 1) :] = order(launch)
    assert seen == order(plain[1])
    assert losses(run) == pytest.approx(losses(plain[0]), rel=BOUND)


# R12: text on one rank, images on another
def test_text_and_images_on_different_ranks_do_not_wait_for_each_other(warm_server, parts, tmp_path):
    """ZeRO-3, every step one rank with images and one without, in turn: 50 steps."""
    rows = json.loads(parts.data.read_text())
    imaged, text = [r for r in rows if "image" in r][:5], [r for r in rows if "image" not in r][:5]
    mixed = []
    for number, (with_one, without) in enumerate(zip(imaged, text, strict=True)):
        mixed += [with_one, without] if number % 2 else [without, with_one]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    changes = {"data_path": tmp_path / "mixed.json", "data_order": "sequential", "max_steps": 50, "save_steps": 50}
    arguments = settings(
        parts, tmp_path / "run", deepspeed=configuration("zero3", tmp_path), per_device_train_batch_size=1, **changes
    )
    launch = run_successfully(warm_server, arguments, tmp_path / "launch", world=2, limit=240)
    assert len(launch.micro_batches(0)) == len(launch.micro_batches(1)) == 50


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_qmoslora_leaves_its_base_alone_and_learns(warm_server, parts, tmp_path, name):
    """NF4 LLM, bf16 adapters, two ranks: every frozen byte is the same afterwards, and the loss falls no less than
    over the same LLM in 16 bits."""
    steps, fallen = 4 * STEPS, {}
    for bits in (4, 16):
        run = tmp_path / f"{bits} bits"
        changes = {"bf16": True, "learning_rate": 1e-2, "max_steps": steps, "save_steps": steps}
        arguments = settings(parts, run, bits=bits, deepspeed=configuration(name, tmp_path), **changes)
        hooks = [["support.frozen:digest_around_training", {}]]
        launch = run_successfully(warm_server, arguments, tmp_path / f"launch-{bits}", world=2, hooks=hooks)
        before, after = re.findall(r"^frozen (.*)$", launch.printed(), re.MULTILINE)
        assert before == after and ("Params4bit" in before) == (bits == 4)
        tensors = load_file(run / f"checkpoint-{steps}" / STATE[0])
        assert all(t.any() for n, t in tensors.items() if "lora_B" in n)
        history = losses(run, steps)
        fallen[bits] = (sum(history[:8]) - sum(history[-8:])) / 8
    assert fallen[16] > 0.3, fallen
    assert fallen[4] > 0.9 * fallen[16], fallen


def test_another_world_size_is_noticed_by_its_random_streams(warm_server, parts, tmp_path):
    """A checkpoint of two ranks holds two ranks' random streams; one rank does not take another's."""
    config = configuration("zero2", tmp_path)
    same = {"deepspeed": config, "save_steps": 1, "resume": True, "max_steps": 2}
    run_successfully(warm_server, settings(parts, tmp_path / "run", **same), tmp_path / "launch", world=2)
    folder = tmp_path / "run" / "checkpoint-2"
    one, other = ((folder / f"random-{rank}.json").read_bytes() for rank in (0, 1))
    assert one and other
    shutil.rmtree(folder)
    alone = settings(parts, tmp_path / "run", **same, per_device_train_batch_size=4)
    run_successfully(warm_server, alone, tmp_path / "alone", world=1)
    assert not (folder / "random-1.json").exists()


def test_a_checkpoint_is_as_large_as_it_must_be(warm_server, parts, tmp_path):
    """Master and two moments in float32 per trained parameter, and at most a tenth more."""
    wider = {
        "model_name_or_path": write_llm(tmp_path / "llm", hidden_size=256, intermediate_size=512),
        "pretrain_mm_mlp_adapter": write_projector(tmp_path / "wider.safetensors", llm=256),
    }
    ranks = {"lora_r": 32, "vision_lora_r": 32, "max_steps": 1, "save_steps": 1}
    config = configuration("zero2", tmp_path)
    arguments = settings(parts, tmp_path / "run", deepspeed=config, **ranks, **wider)
    run_successfully(warm_server, arguments, tmp_path / "launch", world=2)
    folder = tmp_path / "run" / "checkpoint-1"
    trained = sum(t.numel() for t in load_file(folder / STATE[0]).values())
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert trained > 200_000 and 12 * trained < size <= 1.1 * 12 * trained
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".json", ".safetensors", ".md"}  # no pickle
