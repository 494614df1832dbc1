"""A start that is refused: what was there before is still there, and nothing is left that the corrected call minds."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from llava_moslora.errors import Refusal
from llava_moslora.runs.record import read_run
from support.tiny import write_llm
from support.training_runs import losses, rows, train


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(parts, folder)
    return folder


@pytest.fixture(scope="module")
def damaged(parts, tmp_path_factory):
    """Data whose images have a good header and nothing behind it."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(parts.images, folder / "images")
    for image in (folder / "images").iterdir():
        Image.new("RGB", (256, 256), "red").save(image)
        image.write_bytes(image.read_bytes()[:100])
    return folder / "images"


def wrong(case: str, tmp_path, damaged) -> dict:
    return {
        "sample questions": {"sample_questions": tmp_path / "nope.json"},
        "an optimizer's setting": {"adam_beta1": 2},
        "a Trainer's setting": {"eval_strategy": "steps"},
        "a damaged image": {"image_folder": damaged},
    }[case]


CASES = ["sample questions", "an optimizer's setting", "a Trainer's setting", "a damaged image"]


def content(run):
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name not in (".lock", ".locked_by")}


# C12: an output folder that is not empty
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_not_deleted_for_one_that_cannot_start(parts, whole, damaged, tmp_path, case):
    shutil.copytree(whole, tmp_path / "run")
    before = content(tmp_path / "run")
    with pytest.raises(ValueError):
        train(parts, tmp_path / "run", overwrite=True, **wrong(case, tmp_path, damaged))
    assert content(tmp_path / "run") == before


# C12: an output folder that is not empty
@pytest.mark.parametrize("case", CASES)
def test_the_corrected_call_starts(parts, whole, damaged, tmp_path, case):
    with pytest.raises(ValueError):
        train(parts, tmp_path / "run", max_steps=1, **wrong(case, tmp_path, damaged))
    assert not (tmp_path / "run").exists() or content(tmp_path / "run") == {}
    train(parts, tmp_path / "run", max_steps=1)
    assert losses(tmp_path / "run") == losses(whole)[:1]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_died_in_its_first_step_can_be_started_otherwise(parts, tmp_path, monkeypatch, resume):
    import scripts.train_vit_llm as script

    class OutOfMemory(script.MosLoraTrainer):
        def training_step(self, *args, **kwargs):
            raise Refusal("E-MEMORY", "not enough for a step")

    with monkeypatch.context() as patch:
        patch.setattr(script, "MosLoraTrainer", OutOfMemory)
        with pytest.raises(Refusal, match="not enough for a step"):
            train(parts, tmp_path / "run", resume=resume)
    changes = {"per_device_train_batch_size": 1, "max_steps": 1}
    train(parts, tmp_path / "run", resume=resume, **changes)
    assert len(rows(tmp_path / "run")) == 1
    assert read_run(tmp_path / "run").training["per_device_train_batch_size"] == 1
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert report["batch_size"] == 1  # and not that of the first start


def test_a_run_is_replaced_by_one_that_starts(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "notes.md").write_text("mine")
    train(parts, tmp_path / "run", overwrite=True, max_steps=1)
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")}
    written = {"run.json", "tokenizer", "data", "metrics.jsonl", "curves.html", "tensorboard", "checkpoint-1"}
    assert names == written | {"notes.md"}
    assert len(rows(tmp_path / "run")) == 1
    leftovers = {path.name for path in (tmp_path / "run").iterdir()} - names
    assert leftovers == {".lock", ".locked_by"}


def test_a_resume_without_a_valid_checkpoint_touches_nothing(parts, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    file = run / "checkpoint-2" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    before = content(run)
    with pytest.raises(Refusal, match=r"K-NONE.*no checkpoint of this run is valid.*K-HASH"):
        train(parts, run, resume=True, save_steps=1)
    assert content(run) == before


CHANGED = {
    "a setting": ({"learning_rate": 1e-3}, "found learning_rate 0.001; expected learning_rate 0.01"),
    "the global batch": ({"per_device_train_batch_size": 1}, "found global_batch_size 1"),
    "the data": ({"data_path": None}, r"found data_path .*; fix: .*--allow_change data_path data$"),
    "the data's content": ({"data_path": None, "allow_change": "data_path"}, r"found data \['other-"),
    "the LLM": ({"model_name_or_path": None}, r"found llm .*model\.safetensors"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_run_is_refused_before_the_llm_is_loaded(parts, whole, tmp_path, monkeypatch, case):
    import scripts.train_vit_llm as script

    def loaded(*args, **settings):
        raise AssertionError("the LLM would be loaded")

    run = shutil.copytree(whole, tmp_path / "run")
    changes, message = CHANGED[case]
    if "data_path" in changes:
        changes = changes | {"data_path": tmp_path / "other.json"}
        changes["data_path"].write_text(json.dumps(json.loads(parts.data.read_text())[:-1]))
    if case == "the LLM":
        changes = {"model_name_or_path": write_llm(tmp_path / "llm", initializer_range=0.03)}
    before = content(run)
    monkeypatch.setattr(script, "assemble", loaded)
    with pytest.raises(Refusal, match=f"K-CHANGED.*{message}"):
        train(parts, run, resume=True, **changes)
    assert content(run) == before
    with pytest.raises(AssertionError):  # what did not change goes further
        train(parts, run, resume=True)


WITH_DATA = {
    "length": {"model_max_length": 100},
    "share": {"data_share": 0.5},
    "another share": {"data_share": 0.5, "seed": 1},
    "split": {"validation_split": 0.5, "eval_on_start": True},
    "validation file": {"eval_data_path": None, "eval_on_start": True},
}


@pytest.mark.parametrize("case", WITH_DATA)
def test_the_first_refusal_names_all_that_must_be_allowed(parts, whole, tmp_path, monkeypatch, case):
    """Also the data that are not read yet: else a second one would follow when they are tokenised."""
    import scripts.train_vit_llm as script

    def loaded(*args, **settings):
        raise AssertionError("the LLM would be loaded")

    monkeypatch.setattr(script, "assemble", loaded)
    run = shutil.copytree(whole, tmp_path / "run")
    changes = WITH_DATA[case]
    if "eval_data_path" in changes:
        changes = changes | {"eval_data_path": tmp_path / "other.json"}
        changes["eval_data_path"].write_text(json.dumps(json.loads(parts.data.read_text())[::-1]))
    with monkeypatch.context() as patched, pytest.raises(Refusal, match="K-CHANGED") as refusal:
        patched.setattr(script, "prepare", loaded)
        train(parts, run, resume=True, **changes)
    allowed = refusal.value.fix.partition("--allow_change ")[2].split()
    assert set(allowed) & {"data", "validation"} == {"validation file": {"validation"}}.get(case, {"data"}) | (
        {"validation"} if case == "split" else set()
    )
    with pytest.raises(AssertionError):
        train(parts, run, resume=True, allow_change=allowed, **changes)


def other_projector(folder):
    """Of a tower and an LLM with other widths."""
    shapes = {"0.weight": (12, 6), "0.bias": (12,), "2.weight": (12, 12), "2.bias": (12,)}
    save_file({f"model.{name}": torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


QUICK = {
    "no projector": (lambda parts, tmp: {"pretrain_mm_mlp_adapter": tmp / "nope"}, "no such file or folder"),
    "a folder without one": (lambda parts, tmp: {"pretrain_mm_mlp_adapter": parts.images}, "no projector file in this"),
    "a tower in its place": (lambda parts, tmp: {"pretrain_mm_mlp_adapter": parts.clip}, "no projector in this"),
    "another shape": (lambda parts, tmp: {"pretrain_mm_mlp_adapter": other_projector(tmp)}, r"K-SHAPE\] .*0\.weight"),
    "no adapter": (lambda parts, tmp: {"lora_r": 0, "vision_lora_r": 0}, "--lora_r: no adapter to train"),
    "a changed setting": (lambda parts, tmp: {"resume": True, "learning_rate": 1}, "K-CHANGED.*found learning_rate 1"),
    "another LLM": (
        lambda parts, tmp: {"resume": True, "model_name_or_path": write_llm(tmp / "llm", initializer_range=0.03)},
        r"K-CHANGED.*found llm .*model\.safetensors",
    ),
    "other data": (
        lambda parts, tmp: {"resume": True, "data_path": parts.data.with_name("other.json")}, "K-CHANGED.*data_path",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUICK)
def test_what_needs_no_data_is_refused_before_they_are_tokenised(parts, whole, tmp_path, monkeypatch, case):
    """Of a data set that is not in the cache that takes hours."""
    import scripts.train_vit_llm as script

    def tokenised(*args, **settings):
        raise AssertionError("the data would be tokenised")

    monkeypatch.setattr(script, "prepare", tokenised)
    changes, message = QUICK[case]
    given = changes(parts, tmp_path)
    run = shutil.copytree(whole, tmp_path / "run") if "resume" in given else tmp_path / "run"
    with pytest.raises(Refusal, match=message):
        train(parts, run, **given)


def test_inputs_inside_the_run_are_named_before_anything_is_loaded(parts, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(parts.llm, tmp_path / "run" / "llm")
    with pytest.raises(Refusal, match=r"run/llm:--model_name_or_path: an input is in the run folder"):
        train(parts, tmp_path / "run", overwrite=True, model_name_or_path=tmp_path / "run" / "llm")
    assert (tmp_path / "run" / "llm" / "config.json").is_file()


def test_a_checkpoint_can_be_read_by_others(whole):
    modes = {oct(path.stat().st_mode & 0o777) for path in (whole / "checkpoint-2").rglob("*") if path.is_file()}
    assert modes == {oct((whole / "run.json").stat().st_mode & 0o777)}


def test_all_that_a_run_writes_is_known_as_its_own(parts, tmp_path):
    """Else --overwrite True would refuse the run's own files, or leave them for the next run."""
    from llava_moslora.config import TrainingSettings
    from llava_moslora.runs.output_dir import check_output, files_of_run

    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps(json.loads(parts.data.read_text())[:1]))
    train(parts, tmp_path / "run", sample_questions=questions, sample_max_new_tokens=2)
    train(parts, tmp_path / "stage1", tune_mm_mlp_adapter=True)
    for run in (tmp_path / "run", tmp_path / "stage1"):
        assert {path.name for path in files_of_run(run)} == {
            p.name for p in run.iterdir() if not p.name.startswith(".")
        }
        check_output(TrainingSettings(output_dir=str(run), overwrite=True))


def test_nothing_saved_is_said(parts, tmp_path, capsys):
    train(parts, tmp_path / "run", save_strategy="no", max_steps=1)
    said = capsys.readouterr().out.splitlines()
    assert "--save_strategy no: nothing of this run will be saved" in said
    assert said[-1].startswith("trained: ") and said[-1].endswith("there is nothing to export")
    assert "export.py" not in said[-1]


def test_the_last_line_says_what_to_do_next(parts, tmp_path, capsys):
    run = tmp_path / "with space ü"
    train(parts, run, max_steps=1)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"trained: {run}; next: python scripts/export.py '{run}' --output_dir MERGED"


def test_a_damaged_log_stops_no_resume(parts, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    first, second = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(f'{first}\n{{"step": 2, "lo\0ss"}}\n[]\n{second[:9]}}}\n')
    train(parts, run, resume=True)
    assert [row["step"] for row in rows(run)] == [1]
    assert capsys.readouterr().out.count("metrics.jsonl: 3 damaged lines skipped") == 1
    train(parts, run, resume=True)
    assert "damaged lines" not in capsys.readouterr().out


def test_a_resume_saves_as_often_as_it_is_told(parts, tmp_path):
    """The Trainer takes the interval of the checkpoint's state instead."""
    run = tmp_path / "run"
    train(parts, run, max_steps=6, save_steps=3)
    shutil.rmtree(run / "checkpoint-6")
    train(parts, run, max_steps=6, save_steps=1, resume=True)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (3, 4, 5, 6)]
