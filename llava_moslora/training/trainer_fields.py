"""The flags of transformers' ``TrainingArguments``, read from its source: importing it takes seconds, as torch does.

Defaults that are computed cannot be read without running code; the library itself fills them in later.
``tests/training/test_trainer_fields.py`` compares names, defaults and conversions with the imported class.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal, few
from llava_moslora.flags import NOT_KNOWN, Flag

SOURCE, CLASS = "training_args.py", "TrainingArguments"
ENUMERATIONS = (SOURCE, "trainer_utils.py")  # where the types of some fields are declared


@cache
def trainer_fields() -> dict[str, Flag]:
    """Name → flag, in the order of the class.

    Raises:
        Refusal: E-VERSION, transformers is not installed, or its class is not where this package looks for it.
    """
    found = importlib.util.find_spec("transformers")  # imports nothing
    folder = Path(found.origin).parent if found is not None and found.origin else None
    flags: dict[str, Flag] = {}
    if folder is not None and (folder / SOURCE).is_file():
        classes = _classes(folder / SOURCE)
        enumerations = {name: values for file in ENUMERATIONS for name, values in _enumerations(folder / file).items()}
        body = classes[CLASS].body if CLASS in classes else []
        for line in body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                flags[line.target.id] = _flag(line.target.id, line, enumerations)
    if not flags:
        raise Refusal(
            "E-VERSION", "the flags of transformers' Trainer cannot be read", file=folder, key=CLASS,
            fix="pip install 'transformers>=5.17,<6'",
        )  # fmt: skip
    return flags


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _enumerations(file: Path) -> dict[str, tuple]:
    """Class → its values, of classes whose base is an ``Enum`` of some name."""
    found = {}
    for name, node in _classes(file).items():
        if any("Enum" in ast.unparse(base) for base in node.bases):
            lines = [line for line in node.body if isinstance(line, ast.Assign)]
            found[name] = tuple(_value(line.value) for line in lines)
    return found


def _flag(name: str, line: ast.AnnAssign, enumerations: dict[str, tuple]) -> Flag:
    annotation = ast.unparse(line.annotation)
    declared = {}
    if isinstance(line.value, ast.Call):  # field(default=…, metadata={"help": …})
        declared = {keyword.arg: keyword.value for keyword in line.value.keywords}
    elif line.value is not None:
        declared = {"default": line.value}
    default = _value(declared["default"]) if "default" in declared else NOT_KNOWN
    if "default_factory" in declared and ast.unparse(declared["default_factory"]) == "list":
        default = []
    metadata = declared.get("metadata")
    about = {}
    if isinstance(metadata, ast.Dict):
        about = {_value(key): _value(value) for key, value in zip(metadata.keys, metadata.values, strict=True) if key}
    choices = about.get("choices", NOT_KNOWN)
    if choices is NOT_KNOWN:
        choices = next((enumerations[part] for part in re.findall(r"\w+", annotation) if part in enumerations), None)
    return Flag(name, annotation, default, str(about.get("help", "")).replace("%%", "%"), choices and tuple(choices))


def _value(node: ast.expr) -> Any:
    """A literal's value; ``NOT_KNOWN`` for an expression."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return NOT_KNOWN


def check_fields(arguments: type) -> None:
    """
    Raises:
        Refusal: E-VERSION, the imported class has other fields than were read: flags would be unknown, or ignored.
    """
    imported = [f.name for f in dataclasses.fields(arguments) if f.init]
    if different := set(imported) ^ set(trainer_fields()):
        raise Refusal(
            "E-VERSION", "this version of transformers declares its flags differently than expected", key=CLASS,
            found=few(sorted(different)), fix="pip install transformers==5.23.0, the version this was tested with",
        )  # fmt: skip
