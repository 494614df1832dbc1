"""run.json: read back into the settings, also where another version of the package wrote it."""

import json
import os
import re
import sys
from dataclasses import fields

import pytest

from llava_moslora.errors import Refusal
from llava_moslora.runs.record import LLAVA, RUN, SDXL, RunSettings, read_run, write_run
from support.run_folders import check, edit_record, reopen, settings

BEFORE = {
    "model.attn_implementation": ("sdpa", "eager"),
    "data.data_columns": ([], ["messages=dialog"]),
    "data.data_group": (50, 100),
    "data.image_engine": ("pil", "torch"),
    "data.data_weights": ([], [1.0]),
    "training.dropout_masks": ("cpu generator", "philox"),
    "training.loss_average": ("tokens", "micro_batch"),
    "training.packing": (False, True),
    "data.eval_data_path": ([], ["v.json"]),
    "data.validation_split": (0.0, 0.01),
    "data.data_share": (1.0, 0.5),
    "training.early_stopping_threshold": (0.0, 0.1),
}


def with_value(settings: RunSettings, key: str, value: object) -> RunSettings:
    group, _, name = key.partition(".")
    group = getattr(settings, group)
    group.update({name: value}) if isinstance(group, dict) else setattr(group, name, value)
    return settings


@pytest.mark.parametrize("key", BEFORE)
def test_a_run_from_before_a_flag_is_resumed_with_what_it_did(run, key):
    """And read back so."""
    did, other = BEFORE[key]
    group, _, name = key.partition(".")
    edit_record(run, lambda record: record["settings"][group].pop(name, None))
    if group != "training":
        assert getattr(getattr(read_run(run), group), name) == did
    assert reopen(run, with_value(settings(), key, did)).name == "checkpoint-2"
    with pytest.raises(Refusal, match=re.escape(f"found {name} {other}; expected {name} {did}")):
        reopen(run, with_value(settings(), key, other))


def test_one_data_file_as_the_first_versions_recorded_it(run):
    edit_record(run, lambda record: record["settings"]["data"].update(data_path="a.json"))
    assert read_run(run).data.data_path == ["a.json"] and reopen(run).name == "checkpoint-2"


def test_a_setting_of_a_later_version_is_not_ignored(run):
    edit_record(run, lambda record: record["settings"]["adapter"].update(mixer_blocks=4, mixer_note=None))
    assert read_run(run).unknown == {"mixer_blocks": 4, "mixer_note": None}  # exports and answers do without
    with pytest.raises(Refusal, match=r"K-CHANGED.*found mixer_blocks None; expected mixer_blocks 4"):
        reopen(run)


def test_a_kind_of_run_that_is_no_name_is_refused(run):
    edit_record(run, lambda record: record["settings"].update(kind={}))
    with pytest.raises(Refusal, match=r"K-RUN\] .*settings\.kind: a kind of run that this version"):
        read_run(run)


def test_a_value_of_a_later_version_is_refused(run):
    edit_record(run, lambda record: record["settings"]["model"].update(bits=8))
    with pytest.raises(Refusal, match=r"K-RUN.*run.json:--bits: .*found 8; expected 16 \| 4"):
        read_run(run)


def test_what_is_written_is_read_back(run):
    written = settings(bf16=True)
    written.preprocessor = {"size": {"shortest_edge": 32}, "image_mean": [0.5, 0.5, 0.5]}
    write_run(run, written)
    record = read_run(run)
    assert {f.name: getattr(record, f.name) for f in fields(written)} == vars(written)
    assert (record.seeds, record.command, record.unknown) == ([42], sys.argv, {})


RECORDS = {
    "not a dict": lambda record: [],
    "another tool's": lambda record: {"project": "my other tool"},
    "no settings": lambda record: {k: v for k, v in record.items() if k != "settings"},
}


KEYS = ["settings.model", "settings.training", "settings.model.bits", "settings.data.image_aspect_ratio", "versions"]


@pytest.mark.parametrize("case", RECORDS)
def test_another_tools_record_is_no_run(run, case):
    (run / RUN).write_text(json.dumps(RECORDS[case](json.loads((run / RUN).read_text()))))
    with pytest.raises(Refusal, match=r"K-RUN.*run.json: not a record of this package's runs"):
        read_run(run)
    for flags in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(Refusal, match=r"C-OUTPUT.*run.json is not a record of this package's runs"):
            check(run, **flags)


@pytest.mark.parametrize("value", ["missing", 5.5])
@pytest.mark.parametrize("key", KEYS)
def test_a_record_of_another_version_is_refused(run, key, value):
    record = json.loads((run / RUN).read_text()) | {"llava_moslora": "7.0"}
    *groups, name = key.split(".")
    group = record
    for part in groups:
        group = group[part]
    if value == "missing":
        del group[name]
    else:
        group[name] = value
    (run / RUN).write_text(json.dumps(record))
    found = "nothing" if value == "missing" else "5.5"
    with pytest.raises(
        Refusal, match=rf"K-RUN.*run.json:{key}: .*found {found}, written by version 7.0; expected (dict|int|str), as"
    ) as raised:
        reopen(run)
    assert raised.value.exit_status == 3


TYPED = {
    "settings.adapter.lora_r": (True, "int"),
    "settings.adapter.lora_alpha": ("16", "int | float"),
    "settings.adapter.lora_target_modules": ([1], "list"),
    "settings.model.attn_implementation": (None, "str"),
    "settings.data.data_weights": (["x"], "list"),
    "settings.data.validation_split": ({}, "float"),
    "settings.data.image_folder": (["a"], "str | None"),
    "settings.global_batch_size": ("4", "int"),
    "settings.data.data_path": ([["a.json"]], "list"),
    "seeds": (42, "list"),
    "command": ("train", "list"),
}


@pytest.mark.parametrize("key", TYPED)
def test_a_value_of_another_type_is_refused(run, key):
    """Before anything computes with it."""
    value, _ = TYPED[key]
    record = json.loads((run / RUN).read_text())
    *groups, name = key.split(".")
    group = record
    for part in groups:
        group = group[part]
    group[name] = value
    (run / RUN).write_text(json.dumps(record))
    with pytest.raises(Refusal, match=rf"K-RUN\] .*run.json:{key}: .*found {re.escape(str(value))}, written by"):
        read_run(run)


def test_a_damaged_record_of_the_run_is_named(run):
    (run / RUN).write_text('{"settings": ')
    with pytest.raises(Refusal, match=rf"K-RUN.*{RUN}: not JSON: damaged"):
        read_run(run)


def test_the_record_is_replaced_at_once(run, monkeypatch):
    """A kill while it is written leaves the old one."""
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_run(run, settings(learning_rate=1.0))
    assert read_run(run).training == settings().training


def test_a_record_without_a_batch_size_is_another(run):
    edit_record(run, lambda record: record["settings"].pop("global_batch_size"))
    with pytest.raises(Refusal, match=r"K-CHANGED.*found global_batch_size 4; expected global_batch_size None"):
        reopen(run)


@pytest.mark.parametrize(
    "expected, scripts",
    [(LLAVA, "scripts/train_vit_llm.py"), (SDXL, "scripts/train_sdxl.py"),
     (None, "scripts/train_vit_llm.py or scripts/train_sdxl.py")],
)  # fmt: skip
def test_a_missing_run_names_the_script_that_makes_one(tmp_path, expected, scripts):
    with pytest.raises(Refusal, match=rf"C-PATH\] .*no such folder; expected .* --output_dir of {scripts}; fix: "):
        read_run(tmp_path / "none", expected)
