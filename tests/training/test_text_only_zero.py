"""Text alone under every ZeRO configuration: the losses of plain PyTorch, and the same bytes after a kill."""

import pytest

from support.launching import flags
from support.text_runs import text_flags, write_alpaca
from support.zero_runs import configuration, run_successfully

pytestmark = pytest.mark.slow
NAMES = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
BOUND = 5e-6  # relative, of a loss in float32: sums in another order
STATE = ["adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json"]
STEPS = 8


def words(parts, data, run, **changes) -> list[str]:
    same = {"max_steps": STEPS, "save_steps": STEPS, "data_order": "shuffle", "report_to": "none"}
    same |= {"dataloader_num_workers": 0, "train_on_prompt": True, "packing": True, "model_max_length": 256}
    return flags(parts, run, **text_flags(parts, data, **(same | changes)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_alpaca(tmp_path_factory.mktemp("alpaca") / "alpaca.json")


@pytest.fixture(scope="module")
def plain(warm_server, parts, data, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("plain")
    changes = {"lora_dropout": 0, "max_grad_norm": 0, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    run_successfully(warm_server, words(parts, data, folder / "run", **changes), folder / "launch")
    from support.training_runs import losses

    return losses(folder / "run")


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_plain_pytorch(warm_server, parts, data, plain, tmp_path, name):
    from support.training_runs import losses

    changes = {"lora_dropout": 0, "max_grad_norm": 0, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    changes |= {"deepspeed": configuration(name, tmp_path), "recompute": "full"}
    run_successfully(warm_server, words(parts, data, tmp_path / "run", **changes), tmp_path / "launch", world=2)
    assert losses(tmp_path / "run") == pytest.approx(plain, rel=BOUND)


@pytest.mark.parametrize("name", [None, *NAMES])
def test_killed_run_ends_in_the_same_bytes(warm_server, parts, data, tmp_path, name):
    """With dropout, in bf16 under DeepSpeed; killed after its first checkpoint, resumed by the same command."""
    same = {"max_steps": 6, "save_steps": 3, "resume": True, "data_cache": tmp_path / "cache"}
    world = 0
    if name is not None:
        same |= {"deepspeed": configuration(name, tmp_path), "bf16": True}
        world = 2
    whole = words(parts, data, tmp_path / "run", **same)
    run_successfully(warm_server, whole, tmp_path / "launch", world=world)
    again = words(parts, data, tmp_path / "again", **same)
    killed = warm_server.launch(again, tmp_path / "first", world=world, at_step=4)
    assert set(killed.status) == {-9}
    second = run_successfully(warm_server, again, tmp_path / "second", world=world)
    assert second.micro_batches()[0]["step"] == 4
    for file in STATE:
        last = f"checkpoint-6/{file}"
        assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "again" / last).read_bytes(), file
