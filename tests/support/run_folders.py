"""Run folders without a training: their records and checkpoints, written as training writes them."""

import json

from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings, TrainingSettings
from llava_moslora.runs.checkpoints import publish_checkpoint
from llava_moslora.runs.folder import (
    begin_run,
    open_run,
)
from llava_moslora.runs.output_dir import check_output
from llava_moslora.runs.record import RUN, RunSettings, write_run

FILE = "optimizer.safetensors"


FACTS = {"llm": {"config.json": "aa"}, "data": {"data.json": "bb"}}


def settings(**training) -> RunSettings:
    return RunSettings(
        ModelSettings("llm", "clip", version="chatml"),
        DataSettings(["a.json"], data_cache="here"),
        AdapterSettings(lora_r=4, vision_lora_r=2),
        {"seed": 42, "learning_rate": 1e-3} | training,
        preprocessor={},
        global_batch_size=4,
    )


def save(folder, step, **facts):
    def write(staging):
        (staging / FILE).write_bytes(b"weights")

    publish_checkpoint(folder / f"checkpoint-{step}", write, lambda: {"step": step, "seed": 42, **FACTS, **facts})


def content(run):
    """Everything but the lock."""
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in (".lock", ".locked_by")}


def edit_record(run, edit) -> None:
    record = json.loads((run / RUN).read_text())
    edit(record)
    (run / RUN).write_text(json.dumps(record))


def open_new(run, **flags):
    """The lock of a folder that a new run is to begin in."""
    lock, checkpoint = open_run(TrainingSettings(output_dir=str(run), **flags), settings(), FACTS)
    assert checkpoint is None
    return lock


def reopen(run, now=None, facts=FACTS, allow=()):
    training = TrainingSettings(output_dir=str(run), resume=True, allow_change=list(allow))
    lock, checkpoint = open_run(training, now or settings(), facts)
    lock.release()
    return checkpoint


def begin(run, fail=False, **training):
    """As the script does it."""

    def report(folder):
        folder.mkdir()
        (folder / "report.html").write_text("new")

    def record(run):
        write_run(run, settings(**training))
        (run / "tokenizer").mkdir()
        if fail:
            raise OSError("disk full")

    run.mkdir(exist_ok=True)
    begin_run(run, record, report)


def check(run, inputs=(), data_cache=None, **flags) -> None:
    data = None if data_cache is None else DataSettings(["a.json"], data_cache=str(data_cache))
    check_output(TrainingSettings(output_dir=str(run), **flags), inputs, data)
