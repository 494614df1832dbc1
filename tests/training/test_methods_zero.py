"""The adapter methods under ZeRO-2 and ZeRO-3 on two ranks: the losses of plain PyTorch, the same bytes after a kill,
and a proven export."""

import json

import pytest

from llava_moslora.adapters.methods import METHODS as ROWS
from llava_moslora.export.export import REPORT, export
from support.export_runs import probe_here
from support.launching import flags
from support.text_runs import text_flags, write_alpaca
from support.training_runs import losses
from support.zero_runs import configuration, run_successfully

pytestmark = pytest.mark.slow
METHODS = ["dora", "loha", "lokr", "adalora", "pissa", "loraxs", "flora", "nlora", "tsmix"]
BOUND = 5e-6  # relative, of a loss in float32: sums in another order
STATE = ["adapter/adapter_model.safetensors", "optimizer.safetensors", "position.json"]
STEPS = 6


def words(parts, data, run, **changes) -> list[str]:
    """Records of several lengths: the ranks' shares of a batch have different numbers of tokens."""
    same = {"max_steps": STEPS, "save_steps": STEPS // 2, "data_order": "shuffle", "report_to": "none", "resume": True}
    same |= {"dataloader_num_workers": 0, "max_grad_norm": 0, "learning_rate": 1e-3, "lora_alpha": 8}
    return flags(parts, run, **text_flags(parts, data, **(same | changes)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_alpaca(tmp_path_factory.mktemp("alpaca") / "alpaca.json")


@pytest.fixture(scope="module")
def plain(warm_server, parts, data, tmp_path_factory):
    """Method → losses of one process without DeepSpeed, computed once."""
    found = {}

    def of(method: str) -> list[float]:
        if method not in found:
            folder = tmp_path_factory.mktemp(method)
            changes = {"method": method, "lora_dropout": 0, "per_device_train_batch_size": 4}
            run_successfully(warm_server, words(parts, data, folder / "run", **changes), folder / "launch")
            found[method] = losses(folder / "run")
        return found[method]

    return of


CASES = [
    (name, method)
    for name in ("zero2", "zero3")
    for method in METHODS
    if name == "zero2" or not ROWS[method].not_under_zero3
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_losses_resume_and_export(warm_server, parts, data, plain, tmp_path, monkeypatch, name, method):
    """In float32 without dropout; killed after its first checkpoint, resumed by the same command."""
    same = {"method": method, "deepspeed": configuration(name, tmp_path), "data_cache": tmp_path / "cache"}
    same |= {"per_device_train_batch_size": 2, "lora_dropout": 0}
    run, again = tmp_path / "run", tmp_path / "again"
    run_successfully(warm_server, words(parts, data, run, **same), tmp_path / "launch", world=2)
    assert losses(run) == pytest.approx(plain(method), rel=BOUND)
    assert len(set(losses(run))) == STEPS

    command = words(parts, data, again, **same)
    killed = warm_server.launch(command, tmp_path / "first", world=2, at_step=STEPS // 2 + 1)
    assert killed.status == [-9, -9]
    second = run_successfully(warm_server, command, tmp_path / "second", world=2)
    assert second.micro_batches()[0]["step"] == STEPS // 2 + 1
    for file in STATE:
        last = f"checkpoint-{STEPS}/{file}"
        assert (run / last).read_bytes() == (again / last).read_bytes(), file

    probe_here(monkeypatch)
    (exported,) = export(run, tmp_path / "exported", ["llm"]).values()
    report = json.loads((exported / REPORT).read_text())
    assert report["largest_difference"]["logits"] <= 1e-5 and report["same_greedy_answers"]


STOCK = [name for name, row in ROWS.items() if not row.own_layer]  # whose layers are PEFT's
SELECTIVE = [("zero3", name) for name in STOCK if not ROWS[name].not_under_zero3]
SELECTIVE += [("nf4", name) for name in STOCK if not ROWS[name].not_over_nf4]


@pytest.mark.parametrize(("setting", "method"), SELECTIVE)
def test_selective_recomputation_of_stock_layers_changes_nothing(warm_server, parts, data, tmp_path, setting, method):
    """Under ZeRO-3 on two ranks, and over NF4 weights; what runs there in backward is what ran in forward."""
    same = {"method": method, "data_cache": tmp_path / "cache", "per_device_train_batch_size": 2}
    same |= {"deepspeed": configuration("zero3", tmp_path)} if setting == "zero3" else {"bits": 4}
    found = {}
    for mode in ("none", "selective"):
        command = words(parts, data, tmp_path / mode, recompute=mode, **same)
        run_successfully(warm_server, command, tmp_path / f"launch-{mode}", world=2 if setting == "zero3" else 1)
        found[mode] = losses(tmp_path / mode)
    assert found["selective"] == found["none"] and len(set(found["none"])) == STEPS


@pytest.mark.parametrize("method", [name for name, row in ROWS.items() if row.not_under_zero3])
def test_refused_under_zero3_before_anything_is_loaded(warm_server, parts, data, tmp_path, method):
    command = words(parts, data, tmp_path / "run", method=method, deepspeed=configuration("zero3", tmp_path))
    launch = warm_server.launch(command, tmp_path / "launch", world=2)
    assert not launch.succeeded and f"--method {method}, --deepspeed" in launch.printed()
    assert "ZeRO-3" in launch.printed() and not (tmp_path / "run").exists()
