"""What is imported is declared in ``setup.cfg``, and what is declared is imported."""

import ast
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where the name of the import is not the name of the package.
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "google": "protobuf", "open_clip": "open_clip_torch"}
# Imported only where it is there anyway, or asked for by a person who installs it.
NOT_DECLARED = {
    "triton": "comes with torch where there is a GPU",
    "vlmeval": "VLMEvalKit, which imports our class",
    "pandas": "comes with VLMEvalKit, whose tables are made of it",
    "trl": "an example for those who use it",
    "swift": "ms-swift, which loads the example as its plugin",
    "vllm": "of an environment of its own, which slow tests are given",
    "wandb": "a tracker, for --report_to",
    "mlflow": "a tracker, for --report_to",
    "trackio": "a tracker, for --report_to",
    "matplotlib": "draws one figure when the kill tests are asked for it",
}
NOT_IMPORTED = {
    "accelerate": "transformers' Trainer needs it",
    "setuptools": "DeepSpeed builds its operations with it",
    "tensorboard": "the Trainer writes its files with it",
}


def declared() -> dict[str, set[str]]:
    """Package names per extra of ``setup.cfg``; ``""`` is what is always installed."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {extra: {re.split(r"[^\w.-]", line)[0] for line in text.split()} for extra, text in lists.items()}


def imported(folder: str) -> dict[str, Path]:
    """Packages that are imported anywhere in a folder's files, each with one of them; neither Python's nor our own."""
    own = {"llava_moslora", "scripts", "support"} | {path.stem for path in ROOT.glob("*/*.py")}
    own |= {path.stem for path in ROOT.glob("playground/*/*.py")}
    found = {}
    downloaded = [ROOT / "playground" / name for name in ("data", "models", "runs")]  # by the demo
    for path in (ROOT / folder).rglob("*.py"):
        if any(path.is_relative_to(other) for other in downloaded):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0]: path for name in names}
    return {
        PACKAGES.get(name, name): path for name, path in found.items() if name not in {*sys.stdlib_module_names, *own}
    }


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("llava_moslora", ["quant", "clip", "liger", "commonsense", "diffusion"]),
        ("scripts", ["serve"]),
        ("playground", ["demo"]),
        ("benchmarks", ["dev"]),
        ("tests", ["dev", "commonsense"]),
    ],
)
def test_imports_are_declared(folder, extras):
    names = declared()
    allowed = names[""].union(*(names[extra] for extra in extras)) | set(NOT_DECLARED)
    lacking = {name: path for name, path in imported(folder).items() if name not in allowed}
    assert not lacking


def test_what_is_always_installed_is_imported():
    used = imported("llava_moslora").keys() | imported("scripts").keys()
    assert declared()[""] - used == set(NOT_IMPORTED)
