"""wandb, MLflow and Trackio (``--report_to``): what reaches them without a network, and that a resume goes on there.

The slow tests need the packages, which no extra installs: ``pip install wandb mlflow-skinny trackio``.
"""

import gc
import json
import os
import sqlite3
import struct
import sys
from types import SimpleNamespace

import pytest
from transformers.integrations.integration_utils import WandbCallback

from llava_moslora.errors import Refusal
from llava_moslora.runs.output_dir import files_of_run
from llava_moslora.training.callbacks.trackers import TRACKERS_FILE, start_trackers
from support.export_runs import trained_run
from support.training_runs import rows, train

VARIABLES = ("WANDB_RUN_ID", "MLFLOW_RUN_ID", "MLFLOW_MAX_LOG_PARAMS")
FIRST = {"max_steps": 2, "save_steps": 1, "health_steps": 1, "run_name": "tuned"}
RESUMED = FIRST | {"max_steps": 3, "resume": True, "allow_change": "max_steps"}


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """Trains with a tracker, twice, in a folder of its own, where every connection to elsewhere fails."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def look_up(host, *_, **__):
        raise AssertionError(f"asked for {host}")

    monkeypatch.setattr("socket.getaddrinfo", look_up)

    def twice(parts, tracker: str):
        train(parts, tmp_path / "run", report_to=tracker, **FIRST)
        before = json.loads((tmp_path / "run" / TRACKERS_FILE).read_text())
        gc.collect()  # a discarded MLflowCallback ends whatever run is open: two trainings are two processes
        train(parts, tmp_path / "run", report_to=tracker, **RESUMED)
        assert json.loads((tmp_path / "run" / TRACKERS_FILE).read_text()) == before
        return before[tracker], rows(tmp_path / "run")

    yield twice
    for name in VARIABLES:
        os.environ.pop(name, None)


@pytest.mark.slow
def test_mlflow(parts, tracked, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    name, logged = tracked(parts, "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.info.run_id == name and run.info.status == "FINISHED"
    for key in logged[0].keys() - {"step", "epoch"}:  # named as in metrics.jsonl; epochs are also in closing rows
        assert [(m.step, m.value) for m in client.get_metric_history(name, key)] == [
            (r["step"], r[key]) for r in logged
        ]
    assert run.data.params["learning_rate"] == "0.01" and run.data.tags["adapter.lora_r"] == "4"


def records_of(data: bytes):
    """The records of a ``.wandb`` file: a header, then the blocks of LevelDB's log format."""
    at, record = 7, b""
    while at < len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb(parts, tracked, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(WandbCallback, "on_train_end", lambda *_, **__: wandb.finish())  # as the end of a process
    name, logged = tracked(parts, "wandb")
    found, settings = [], {}
    for file in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb")):
        for record in map(Record.FromString, records_of(file.read_bytes())):
            if record.HasField("history"):
                items = record.history.item
                found.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
            for item in record.config.update:
                settings["/".join(item.nested_key) or item.key] = item.value_json
    figures = [row for row in found if "train/loss" in row]
    expected = [{"train/global_step": row.pop("step")} | {f"train/{k}": v for k, v in row.items()} for row in logged]
    assert [{key: row.get(key) for key in expected[0]} for row in figures] == expected
    assert settings["learning_rate"] == "0.01" and settings["adapter.lora_r"] == "4"


@pytest.mark.slow
def test_trackio(parts, tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    name, logged = tracked(parts, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "huggingface.db") as database:
        found = database.execute("select run_name, metrics from metrics order by step, id").fetchall()
        (settings,) = {config for (config,) in database.execute("select config from configs")}
    assert name == "tuned" and {run for run, _ in found} == {name}
    figures = [row for row in (json.loads(metrics) for _, metrics in found) if "train/loss" in row]
    expected = [{"train/global_step": row.pop("step")} | {f"train/{k}": v for k, v in row.items()} for row in logged]
    assert figures == expected
    assert json.loads(settings)["adapter.lora_r"] == 4


@pytest.fixture
def wandb_setup(parts, tmp_path, monkeypatch):
    """``call(setup)``: start wandb, whose part of the work is ``setup``, for the run in ``tmp_path / "run"``."""
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    callback = WandbCallback.__new__(WandbCallback)  # its __init__ needs the package

    def call(setup, main_process: bool = True):
        monkeypatch.setattr(WandbCallback, "setup", lambda self, *_: setup())
        state = SimpleNamespace(is_world_process_zero=main_process)
        handler = SimpleNamespace(callbacks=[callback])
        start_trackers(SimpleNamespace(state=state, callback_handler=handler, args=None, model=None), tmp_path / "run")

    return call


def test_a_resume_finds_its_chart(wandb_setup, tmp_path, monkeypatch):
    settings, asked = {}, []
    run = SimpleNamespace(id="abc", config=SimpleNamespace(update=lambda new, **_: settings.update(new)))
    library = SimpleNamespace(run=run, init=lambda **given: asked.append(given))
    monkeypatch.setitem(sys.modules, "wandb", library)
    for _ in range(2):
        wandb_setup(lambda: asked.append("setup"))
    assert asked == ["setup", {"project": "huggingface", "id": "abc", "resume": "allow"}, "setup"]
    assert settings["adapter.lora_r"] == 4 and settings["model.bits"] == 16
    assert tmp_path / "run" / TRACKERS_FILE in files_of_run(tmp_path / "run")  # what --overwrite deletes


def test_a_tracker_that_does_not_start(wandb_setup, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())

    def fail():
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    message = r"E-TRACKER\] --report_to wandb: cannot be started; found RuntimeError: No API key configured\. Use .*"
    with pytest.raises(Refusal, match=message + r"; fix: wandb login, or WANDB_MODE=offline"):
        wandb_setup(fail)
    assert not (tmp_path / "run" / TRACKERS_FILE).exists()
    wandb_setup(fail, main_process=False)
