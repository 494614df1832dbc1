"""The house keeps its floors: who may import whom, and a README whose file tree is true."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_moslora"
# From below upwards; rooms of one floor are siblings and never import each other.
FLOORS = [
    {"errors", "_version", "config", "distributed"},
    {"files", "recompute"},
    {"adapters", "text"},
    {"models", "data"},
    {"runs"},
    {"inference"},
    {"training", "export", "evaluation", "planning"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
EXCEPTIONS = {("models/assemble.py", "adapters")}
MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports anywhere in it, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {m[1] for name in names if (m := re.match(r"llava_moslora\.(\w+)", name))}
    return rooms & set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_to_the_floors(module):
    room = module.split("/")[0].removesuffix(".py")
    for imported in imported_rooms(PACKAGE / module) - {room}:
        if (module, imported) not in EXCEPTIONS:
            assert FLOOR[imported] < FLOOR[room], f"{module} ({room}) imports {imported}"


def test_every_room_has_a_floor():
    rooms = {m.split("/")[0].removesuffix(".py") for m in MODULES}
    assert rooms <= set(FLOOR)


def test_readme_tree_names_every_file():
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [PACKAGE, ROOT / "scripts", ROOT / "zero_configs", ROOT / "benchmarks", ROOT / "playground"]
    kinds = {".py", ".sh", ".json"}
    ignored = {"data", "models", "runs", "results", "clip-tiny", "projector-tiny"}
    for folder in shown:
        for path in folder.rglob("*"):
            inside = path.relative_to(folder).parts
            generated = folder.name in ("playground", "benchmarks") and inside[0] in ignored
            if path.suffix in kinds and path.name != "__init__.py" and not generated:
                assert re.search(rf"\b{re.escape(path.name)}\b", tree), (
                    f"README's file tree lacks {path.relative_to(ROOT)}"
                )


def test_no_remote_code_no_unsafe_loading():
    """The security floor, as a grep over everything that ships."""
    forbidden = [r"trust_remote_code=True", r"\bpickle\b\.", r"yaml\.load\(", r"\beval\(", r"shell=True", r"extractall"]
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for pattern in forbidden:
            hits = [m for m in re.finditer(pattern, text) if not text[: m.start()].endswith((".", "model"))]
            assert not hits, f"{path}: {pattern}"
        for call in re.finditer(r"torch\.load\(([^)]*)\)", text):
            assert "weights_only=True" in call[1], f"{path}: torch.load without weights_only=True"
