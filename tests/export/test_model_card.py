"""The model card: huggingface_hub reads its front matter, its Python runs, and it states what is known and no more."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.ask import source_header
from llava_moslora.evaluation.results import Result, write_results
from llava_moslora.evaluation.scoring import Outcome, Score, Unit
from llava_moslora.export.card_data import read_base
from llava_moslora.export.export import TARGETS, export
from llava_moslora.export.model_card import usage
from llava_moslora.export.trained_run import open_trained
from llava_moslora.files.manifest import MANIFEST, sha256
from support.export_runs import trained_run

LLAMA3 = "---\nlicense: llama3\nlicense_name: llama3\nlicense_link: LICENSE\n---\n# Llama"


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """Over an LLM as the Hub's cache keeps it, and a tower whose configuration has its name."""
    place = tmp_path_factory.mktemp("card")
    llm = place / "models--meta-llama--Llama-Tiny" / "snapshots" / "0a1b"
    shutil.copytree(parts.llm, llm)
    (llm / "README.md").write_text(LLAMA3)
    (llm / "LICENSE").write_text("the text of the license")
    clip = shutil.copytree(parts.clip, place / "clip")
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(config | {"_name_or_path": "openai/clip-tiny"}))
    trained_run(place / "run", llm, clip, parts.projector)
    return place / "run"


@pytest.fixture(scope="module")
def plain_run(parts, tmp_path_factory):
    """Over folders that say nothing about where they come from."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    trained_run(folder, parts.llm, parts.clip, parts.projector)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    made = {}

    def folder(kind: str):
        if kind not in made:
            made[kind] = export(run, run.parent / "out" / kind, [kind], prove=False)[kind]
        return made[kind]

    return folder


def card_of(folder) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind, library, relation, task", [
    ("hf", "transformers", "finetune", "image-text-to-text"),
    ("peft", "peft", "adapter", "image-text-to-text"),
    ("xtuner_adapters", "peft", "adapter", "image-text-to-text"),
    ("llm", "transformers", "finetune", "text-generation"),
    ("vision", "transformers", "finetune", "image-feature-extraction"),
    ("projector", "transformers", "adapter", None),
])  # fmt: skip
def test_front_matter(exported, kind, library, relation, task):
    data = card_of(exported(kind)).data
    models = {"llm": ["meta-llama/Llama-Tiny"], "vision": ["openai/clip-tiny"]}
    assert data.base_model == models.get(kind, ["meta-llama/Llama-Tiny", "openai/clip-tiny"])
    assert (data.library_name, data.get("base_model_relation"), data.pipeline_tag) == (library, relation, task)
    assert data.license == ("other" if kind == "vision" else "llama3")
    assert data.tags == ["llava", "moslora"] and data.language is None and data.eval_results is None


def test_licenses_are_those_of_the_base_and_go_along(exported):
    folder = exported("hf")
    data, text = card_of(folder).data, (folder / "README.md").read_text()
    assert (folder / data.license_link).read_text() == "the text of the license"
    assert "- llm: `meta-llama/Llama-Tiny`, license `llama3`, as its README says" in text
    assert "- vision tower: `openai/clip-tiny`, license not known here" in text and "Before sharing this model" in text
    assert "# base_model: _name_or_path in the vision tower's config.json says openai/clip-tiny\n" in text


def test_what_is_not_known_is_not_named(plain_run, tmp_path):
    folder = export(plain_run, tmp_path / "out", prove=False)["hf"]
    data, text = card_of(folder).data, (folder / "README.md").read_text()
    assert data.base_model is None and data.datasets is None and data.license == "other"
    assert '# base_model: add the name on the Hub of the llm, here a folder "llm"\n' in text
    assert not (folder / "licenses").exists()


@pytest.mark.parametrize("said", ["../llama", "/data/owner/llama", "llama", "owner/", 3, None])
def test_a_path_is_no_name_of_the_hub(parts, tmp_path, said):
    clip = shutil.copytree(parts.clip, tmp_path / "clip")
    (clip / "config.json").write_text(json.dumps({"_name_or_path": said}))
    assert read_base("vision tower", str(clip)).hub_id is None
    assert read_base("vision tower", "open_clip:ViT-B-32@laion400m").name == "ViT-B-32 of open_clip"


def test_a_license_without_a_readme(parts, tmp_path):
    llm = shutil.copytree(parts.llm, tmp_path / "My LLM")
    (llm / "LICENSE.txt").write_text("text")
    trained_run(tmp_path / "run", llm, parts.clip, parts.projector)
    folder = export(tmp_path / "run", tmp_path / "out", ["llm"], prove=False)["llm"]
    data = card_of(folder).data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "my-llm-license",
        "licenses/llm/LICENSE.txt",
    )
    assert (folder / data.license_link).read_text() == "text"


def test_what_was_trained_on_what(run, tmp_path, monkeypatch):
    record = json.loads((run / "run.json").read_text())
    record["settings"]["data"]["data_path"] = ["mix/llava.json", "hub:owner/captions/small@main:train[:9]"]
    record["settings"]["training"] |= {"learning_rate": 2e-4, "vision_lr": 2e-5, "lr_scheduler_type": "cosine"}
    record["settings"]["global_batch_size"] = 128
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "run.json").write_text(json.dumps(record))
    (copy / "data").mkdir()
    files = [{"file": "mix/llava.json", "formats": [], "records": 1000, "kept": 990, "seen_per_epoch": 495.0}]
    (copy / "data" / "report.json").write_text(json.dumps({"files": files, "images": 700, "trained_tokens": 12345}))
    folder = export(copy, tmp_path / "out", ["projector"], prove=False)["projector"]
    text = (folder / "README.md").read_text()
    assert card_of(folder).data.datasets == ["owner/captions"]
    for fact in ("| records per step | 128 |", "| learning rate | LLM 0.0002, tower 2e-05, cosine |",
                 "- `llava.json`: 990 records of 1,000, each seen 0.5 times per epoch", "700 images and 12,345 tokens",
                 "rank 4, alpha 8, dropout 0.05; mixers trained, kaiming_uniform init"):  # fmt: skip
        assert fact in text, fact


def test_an_adapter_is_loaded_over_the_base_it_was_trained_on(exported):
    """A name that only a configuration says may be that of an earlier model: the Python names the folder then."""
    text = (exported("peft") / "README.md").read_text()
    assert 'from_pretrained("meta-llama/Llama-Tiny")' in text and 'from_pretrained("openai/clip-tiny")' not in text
    assert re.search(r'from_pretrained\("/.*/clip"\)', text)


def test_its_python_loads_no_adapter_that_is_not_there(run, tmp_path):
    (tmp_path / "llm_adapter").mkdir()
    text = usage(open_trained(run, run / "checkpoint-1"), TARGETS["peft"], tmp_path)
    assert "llm_adapter" in text and "vision_adapter" not in text


def results(output, source, asked: dict) -> None:
    def of(name: str, value: float | None) -> Result:
        header = {"benchmark": name, "prompts": "prompts"} | asked
        return Result(header, Score(value, "rules", (Outcome("1", "A", "letter", 1.0),), (Unit("1", 1.0),), {}))

    output.mkdir(exist_ok=True)
    write_results(output, str(source), {"seed": of("seed", 65.43), "mmvet": of("mmvet", None)}, [], "")


def test_scores(run, tmp_path):
    results(tmp_path / "evaluation", run, source_header(run, run / "checkpoint-1"))
    folder = export(run, tmp_path / "out", evaluation=tmp_path / "evaluation", prove=False)["hf"]
    data = card_of(folder).data
    (result,) = data.eval_results  # of huggingface_hub; that of MM-Vet needs a judge and is none
    assert data.model_name == "out" and result.task_type == data.pipeline_tag
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("SEED-Bench image", "accuracy", 65.43)
    assert "| SEED-Bench image | 65.4 |" in (folder / "README.md").read_text()


def test_scores_of_another_model(run, exported, tmp_path, monkeypatch):
    ours = sha256(run / "checkpoint-1" / MANIFEST)
    of_export = source_header(exported("llm"), None)
    assert of_export["export_of"] == ours
    for asked in ({"model": "0", "checkpoint": "checkpoint-1"}, of_export | {"export_of": "0"}):
        results(tmp_path / "evaluation", run, asked)
        with pytest.raises(Refusal, match=r"C-COMPARE.*--evaluation: results of another model"):
            export(run, tmp_path / "out", evaluation=tmp_path / "evaluation", prove=False)
    for asked in ({"model": ours, "checkpoint": None}, {"model": ours, "checkpoint": None, "export_of": None}):
        results(tmp_path / "evaluation", "old/export", asked)  # of before the checkpoint's hash was kept
        with pytest.raises(Refusal, match=r"did not record which checkpoint.*found old/.*fix: evaluate again"):
            export(run, tmp_path / "out", evaluation=tmp_path / "evaluation", prove=False)
    results(tmp_path / "evaluation", "a/path/as/it/was/typed", of_export)  # an export of this checkpoint, wherever
    export(run, tmp_path / "out", evaluation=tmp_path / "evaluation" / "results.json", prove=False)
    with pytest.raises(Refusal, match=r"C-PATH.*--evaluation: no results"):
        export(run, tmp_path / "other", evaluation=tmp_path, prove=False)


@pytest.mark.parametrize("kind, made", [
    ("hf", "answer"), ("peft_with_base", "answer"), ("llm", "answer"), ("peft", "llm"), ("vision", "tower"),
    ("projector", "weights"),
])  # fmt: skip
def test_its_python_runs(plain_run, tmp_path, monkeypatch, kind, made):
    """As it stands, in the folder of the export."""
    folder = export(plain_run, tmp_path / "out", [kind], prove=False)[kind]
    Image.new("RGB", (48, 32), "red").save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    result = SimpleNamespace(**names)
    assert getattr(result, made) is not None
    if made == "answer":
        assert result.answer.dtype == torch.int64 and len(result.answer) > 0
    if kind in ("hf", "peft_with_base"):
        assert (result.inputs["input_ids"] == result.model.config.image_token_id).sum() == 16
