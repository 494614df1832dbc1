"""An export target is one object: ``--help``, README and the model card are made from it, and a new one is one more."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_moslora.export.export import TARGETS, export
from llava_moslora.export.formats import FORMATS
from llava_moslora.export.model_card import XTUNER_TEMPLATES
from llava_moslora.export.target import ExportPlan, Target
from llava_moslora.export.writer import WeightFiles
from llava_moslora.text.templates import TEMPLATES, TOKENIZER_TEMPLATE
from support.export_runs import trained_run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from export import format_list  # noqa: E402


@pytest.mark.parametrize("name", TARGETS)
def test_usage_is_python_with_every_name_imported(name):
    tree = ast.parse(TARGETS[name].usage)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {"print"}
    known |= {"FOLDER", "TEMPLATE", "CLASS_TOKENS", "MAX_LORA_RANK"}  # filled in by the card
    known |= {name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names}
    assert {node.id for node in names} <= known


def test_every_prompt_template_has_its_name_in_xtuner():
    assert set(XTUNER_TEMPLATES) == {*TEMPLATES, TOKENIZER_TEMPLATE}


def test_readme_lists_the_targets():
    readme = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | {target.summary} |" for name, target in TARGETS.items()]
    assert "\n".join(rows) in readme


def test_help_lists_the_targets():
    words = " ".join(format_list().split())
    for name, target in TARGETS.items():
        assert f"{name} {target.summary.replace('`', '')}" in words


def test_the_flag_and_the_target_of_its_own_are_the_same(parts, tmp_path):
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    flag = export(tmp_path / "run", tmp_path / "flag", ["peft"], with_base=True, prove=False)["peft"]
    own = export(tmp_path / "run", tmp_path / "own", ["peft_with_base"], prove=False)["peft_with_base"]
    for file in (p for p in flag.rglob("*") if p.is_file() and p.name not in ("README.md", "MANIFEST.json")):
        assert file.read_bytes() == (own / file.relative_to(flag)).read_bytes(), file


def embeddings(trained, dtype) -> ExportPlan:
    """Of a toy target: the word embeddings, and how many there are."""
    tensors = [planned for planned in trained.llm_tensors() if planned.name == "model.embed_tokens.weight"]

    def write_files(folder: Path) -> None:
        (folder / "rows.json").write_text(json.dumps(trained.vocabulary))

    return ExportPlan([WeightFiles("", tensors, dtype)], write_files, {}, not_provable="nothing to compute with")


TOY = Target(
    name="embeddings",
    summary="the word embeddings alone",
    usage="""from safetensors.torch import load_file
rows = load_file(FOLDER + "/model.safetensors")""",
    plan=embeddings,
)


def test_a_new_target_is_one_object_and_its_rows(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "embeddings", TOY)
    monkeypatch.setitem(FORMATS, "embeddings", TOY.summary)  # for --help
    trained_run(tmp_path / "run", parts.llm, parts.clip, parts.projector)
    folder = export(tmp_path / "run", tmp_path / "out", ["embeddings"], dtype=torch.bfloat16)["embeddings"]
    tensors = load_file(folder / "model.safetensors")
    assert list(tensors) == ["model.embed_tokens.weight"]
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert json.loads((folder / "rows.json").read_text()) == len(tensors["model.embed_tokens.weight"])
    assert json.loads((folder / "export.json").read_text())["format"] == "embeddings"
    card = (folder / "README.md").read_text()
    assert TOY.usage in card and f"`embeddings`: {TOY.summary}" in card and "None: nothing to compute with." in card
    assert re.search(r"embeddings\s+the word embeddings alone", format_list())
