"""Every numbered case of ``support/cases.py`` is tested, and a number never stands without its words."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from support.cases import CASES

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\b[DICKR][1-9]\d?\b")


@cache
def marked_blocks() -> dict[Path, list[str]]:
    """The test functions and tables of every test file: their text, with the comments above."""
    return {path: _blocks(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("test_*.py")}


def _blocks(text: str) -> list[str]:
    lines, blocks = text.splitlines(), []
    for node in ast.parse(text).body:
        is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if is_test or isinstance(node, ast.Assign):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            while first and lines[first - 1].startswith("#"):
                first -= 1
            blocks.append("\n".join(lines[first : node.end_lineno]))
    return blocks


@pytest.mark.parametrize("number", CASES)
def test_a_test_bears_its_number_and_words(number):
    said = re.compile(rf"# {number}: {re.escape(CASES[number])}(?! *\w)")
    assert any(said.search(block) for blocks in marked_blocks().values() for block in blocks)


@pytest.mark.parametrize("path", sorted(marked_blocks()), ids=lambda path: path.relative_to(ROOT / "tests").as_posix())
def test_numbers_come_with_their_words(path):
    text = path.read_text(encoding="utf-8")
    for number in {found[0] for found in NUMBER.finditer(text)}:
        assert f"# {number}: {CASES[number]}" in text, f"{number} without its words"


def test_the_program_bears_no_numbers():
    for folder in ("llava_moslora", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not NUMBER.search(path.read_text(encoding="utf-8")), path
