"""Ranks that were started with other flags or other inputs: refused on all of them, before a model is loaded."""

import json
from dataclasses import replace

import pytest

import scripts.train_vit_llm as script
from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.training import same_on_ranks as module
from llava_moslora.training.arguments import TrainingArguments
from support.training_runs import train
from support.zero_runs import run_successfully, settings


def given(tmp_path, model="llm", data="a.json", cache="here", dropout=0.05, **training):
    args = TrainingArguments(output_dir=str(tmp_path / "run"), **training)
    return (
        args,
        ModelSettings(model, "clip"),
        DataSettings([data], data_cache=cache),
        AdapterSettings(lora_dropout=dropout),
    )


@pytest.fixture
def refusal_of(monkeypatch):
    """``refusal_of(*calls)``: of settings given on ranks 0, 1, …; the same line on each, None where all are alike."""

    def line(*calls) -> str | None:
        seen: list[dict] = []
        with monkeypatch.context() as patched:
            patched.setattr(module, "from_all_ranks", lambda values: seen.append(values) or [values])
            for call in calls:
                module.check_same_settings(*call)
        lines = []
        for own in seen:
            with monkeypatch.context() as patched:
                patched.setattr(module, "from_all_ranks", lambda _: seen)
                try:
                    module._check_same(own, "alike")
                except Refusal as refusal:
                    assert refusal.code == "C-RANKS" and refusal.exit_status == 2
                    lines.append(refusal.line())
        assert len(lines) in (0, len(calls)) and len(set(lines)) <= 1
        return lines[0] if lines else None

    return line


def test_another_learning_rate_is_named_with_its_rank(tmp_path, refusal_of):
    first = given(tmp_path, learning_rate=1e-3)
    line = refusal_of(first, first, given(tmp_path, learning_rate=1e-4))
    assert line == (
        "error[C-RANKS] learning_rate: not the same on all ranks; found learning_rate 0.0001 on rank 2; "
        "expected learning_rate 0.001, as on rank 0; fix: alike"
    )


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("max_steps", {"max_steps": 4}),
        ("save_steps", {"save_steps": 7}),  # decides nothing that is computed, but when ranks wait for each other
        ("recompute", {"recompute": "full"}),
        ("resume", {"resume": True}),
        ("lora_dropout", {"dropout": 0.1}),
    ],
)
def test_every_flag_is_compared(tmp_path, refusal_of, key, changes):
    line = refusal_of(given(tmp_path), given(tmp_path, **changes))
    assert line.startswith(f"error[C-RANKS] {key}: not the same") and "on rank 1" in line


def test_of_many_differences_a_few_are_told(tmp_path, refusal_of):
    other = given(tmp_path, learning_rate=1e-4, max_steps=3, weight_decay=0.1, seed=1, adam_beta1=0.8)
    assert " and 2 more: not the same on all ranks" in refusal_of(given(tmp_path), other)


def test_a_host_may_have_its_files_elsewhere(tmp_path, refusal_of):
    there = given(tmp_path, model="/data/llm", data="/data/a.json", cache="/tmp", dataloader_num_workers=3)
    assert refusal_of(given(tmp_path), there) is None
    args, model, data, adapter = there
    line = refusal_of(given(tmp_path), (args, model, replace(data, image_folder="images"), adapter))
    assert "image_folder: not the same" in line  # with images and without


def test_the_content_of_the_deepspeed_file_is_compared(tmp_path, refusal_of):
    calls = []
    for rank, size in enumerate((5e5, 5e5, 6e5)):
        (tmp_path / f"{rank}.json").write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": size}}))
        call = given(tmp_path)
        call[0].deepspeed = str(tmp_path / f"{rank}.json")
        calls.append(call)
    assert refusal_of(*calls[:2]) is None
    assert "content of --deepspeed: not the same" in refusal_of(*calls)


@pytest.mark.parametrize(
    ("changed", "key", "found"),
    [
        ({"data": "0badcafe"}, "data", "data 0badcafe on rank 1"),
        ({"llm": {"config.json": "ff"}}, "llm", "llm {'config.json': 'ff'"),
        ({"records": 3}, "records", "records 3 on rank 1"),
    ],
)
def test_other_inputs_are_refused_before_the_model_is_loaded(parts, tmp_path, monkeypatch, changed, key, found):
    def with_rank_1(values):
        return [values, values | changed if "records" in values else values]

    monkeypatch.setattr(module, "from_all_ranks", with_rank_1)
    monkeypatch.setattr(script, "build_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(Refusal, match=rf"C-RANKS. {key}: not the same on all ranks") as refusal:
        train(parts, tmp_path / "run")
    assert found in refusal.value.line() and "copy rank 0's" in refusal.value.line()
    assert not (tmp_path / "run" / "run.json").exists()


def test_data_are_compared_by_their_records(parts, tmp_path, monkeypatch):
    """And not by the names of their files."""

    class Loaded(Exception):
        pass

    def read(folder, changed_file=None) -> dict:
        seen = []
        for name in ("train", "eval"):
            records = json.loads(parts.data.read_text())[:: 1 if name == "train" else -1]
            if name == changed_file:
                records[0]["conversations"][1]["value"] = "square"
            (tmp_path / f"{folder}_{name}.json").write_text(json.dumps(records))
        files = {"data_path": tmp_path / f"{folder}_train.json", "eval_data_path": tmp_path / f"{folder}_eval.json"}
        with monkeypatch.context() as patched, pytest.raises(Loaded):
            patched.setattr(module, "from_all_ranks", lambda values: seen.append(values) or [values])
            patched.setattr(script, "build_model", lambda *_: (_ for _ in ()).throw(Loaded))
            train(parts, tmp_path / "run", eval_on_start=True, **files)
        return seen[-1]

    first = read("one")
    assert first["records"] == len(json.loads(parts.data.read_text())) and len(first["validation"]) == 1
    assert read("another") == first
    for file, key in (("train", "data"), ("eval", "validation")):
        other = read(f"changed_{file}", file)
        assert [name for name in first if other[name] != first[name]] == [key]


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "key"), [("--learning_rate", "learning_rate"), ("--data_path", "data")])
def test_two_ranks_end_at_once(warm_server, parts, tmp_path, flag, key):
    """Before, both trained on with their own values."""
    records = json.loads(parts.data.read_text())
    for turn in (turn for record in records for turn in record["conversations"] if turn["from"] == "gpt"):
        turn["value"] = "square"
    (tmp_path / "other.json").write_text(json.dumps(records))
    value = {"--learning_rate": "1e-4", "--data_path": str(tmp_path / "other.json")}[flag]
    words = settings(parts, tmp_path / "run", max_steps=2)
    hooks = [["support.ranks:other_flag", {"rank": 1, "flag": flag, "value": value}]]
    launch = warm_server.launch(words, tmp_path / "launch", world=2, hooks=hooks, limit=60)
    assert launch.status == [2, 2] and not launch.micro_batches(0)
    for rank in (0, 1):
        assert f"error[C-RANKS] {key}: not the same on all ranks; found {key} " in launch.printed(rank)
    run_successfully(warm_server, words, tmp_path / "alike", world=2)
