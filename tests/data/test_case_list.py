"""The table of bad inputs is complete: every case has a test that bears its number."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = [*(f"D{k}" for k in range(1, 25)), *(f"I{k}" for k in range(1, 18))]


@pytest.mark.parametrize("case", CASES)
def test_a_test_bears_its_number(case):
    marked = re.compile(rf"def test_\w+\(.*# .*\b{case}\b|\(\"{case}\",")
    files = [path.name for path in HERE.glob("test_*.py") if marked.search(path.read_text(encoding="utf-8"))]
    assert files
