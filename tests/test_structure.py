"""The rules of the source tree: who may import whom, no circular imports, short files and functions, a README whose
file tree is true, nothing unsafe, and nothing outside the repository."""

import ast
import io
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_moslora"
# Lowest first; packages in one layer never import each other.
LAYERS = [
    {"stopping", "defect_report", "_version"},
    {"errors"},
    {"config", "devices", "distributed", "flags", "noise", "pages", "private_api"},
    {"files", "recompute", "sdxl_settings"},
    {"adapters", "text"},
    {"models", "data"},
    {"runs"},
    {"inference"},
    {"training", "export", "evaluation", "planning"},
    {"studies", "diffusion"},
    {"cli"},
]
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}
EXCEPTIONS = {("models/assemble.py", "adapters"), ("models/adapt.py", "adapters")}
MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")
DOWNLOADED = [ROOT / "playground" / name for name in ("data", "models", "runs")]  # by the demo
SOURCES = sorted(
    p
    for folder in ("llava_moslora", "scripts", "playground", "benchmarks")
    for p in (ROOT / folder).rglob("*.py")
    if not any(p.is_relative_to(folder) for folder in DOWNLOADED)
)
# Lines of a file and lines of code of a function above which a reason is due.
LONGEST_FILE, LONGEST_FUNCTION = 350, 60
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, also inside functions; ``from a import b`` gives a and a.b."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def package_of(module: str) -> str:
    return module.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("module", MODULES)
def test_imports_respect_the_layers(module):
    packages = {m[1] for name in imports(PACKAGE / module) if (m := re.match(r"llava_moslora\.(\w+)", name))} & set(
        LAYER
    )
    assert not any(name.split(".")[0] in ("scripts", "tests", "support") for name in imports(PACKAGE / module))
    for imported in packages - {package_of(module)}:
        if (module, imported) not in EXCEPTIONS:
            assert LAYER[imported] < LAYER[package_of(module)], f"{module} imports {imported}"


def test_every_package_has_a_layer():
    assert {package_of(module) for module in MODULES} <= set(LAYER)


def test_no_import_is_circular():
    """Imports inside functions count too."""
    named = {f"llava_moslora.{module.removesuffix('.py').replace('/', '.')}": PACKAGE / module for module in MODULES}
    left = {name: (imports(path) & set(named)) - {name} for name, path in named.items()}
    while ends := {name for name in left if not left[name] or not any(name in others for others in left.values())}:
        left = {name: others - ends for name, others in left.items() if name not in ends}
    assert not left


def test_files_are_short():
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE and name not in LONG_FILES} == {}
    assert set(LONG_FILES) <= {name for name, length in lengths.items() if length > LONGEST_FILE}


def test_functions_are_short():
    """Lines of code: neither blank nor comment nor docstring; a function inside another one is part of it."""
    lengths = {}
    for path in SOURCES:
        code = code_lines(path)
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT).as_posix()}:{node.name}"
                lengths[name] = max(lengths.get(name, 0), len(code & set(range(node.lineno, node.end_lineno + 1))))
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION and name not in LONG_FUNCTIONS} == {}
    assert set(LONG_FUNCTIONS) <= {name for name, n in lengths.items() if n > LONGEST_FUNCTION}


def code_lines(path: Path) -> set[int]:
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def files_in_tree(readme: str) -> set[str]:
    """Paths in README's file tree: a line is indented below its folder and begins with names."""
    folders, found = {}, set()
    for line in readme[readme.index("\nllava_moslora/\n") :].split("```")[0].splitlines():
        depth = len(line) - len(line.lstrip())
        folders = {at: name for at, name in folders.items() if at < depth}
        for word in line.split():
            if word.endswith("/"):
                folders[depth] = word
            elif re.fullmatch(r"[\w-]+\.(py|sh|json)", word):
                found.add("".join(folders.values()) + word)
            else:
                break
    return found


def test_readme_tree_is_true():
    here = {path for folder in ("llava_moslora", "scripts", "zero_configs", "benchmarks", "playground")
            for path in tracked() if path.startswith(f"{folder}/") and re.search(r"\.(py|sh|json)$", path)}  # fmt: skip
    generated = re.compile(r"/__init__\.py$|^benchmarks/results/|^playground/([\w-]+-tiny|\w+/experiments)/")
    tree = files_in_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    expected = {path for path in here if not generated.search(path)}
    assert (sorted(expected - tree), sorted(tree - expected)) == ([], []), "(lacking in README, only in README)"


@cache
def tracked() -> list[str]:
    """Files of the repository; where git is not there, all that are not hidden or built."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    names = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    built = {"data", "models", "runs", "build", "__pycache__"}
    return [p.as_posix() for p in names if not any(part.startswith(".") or part in built for part in p.parts[:2])]


def test_nothing_is_named_outside_the_repository():
    """Neither a folder next to it nor one of somebody's machine."""
    outside = re.compile(r"(?<![\w/.])\.\./\w+/|(?<![\w.])/(home|root|work|Users|mnt)/\w")
    for name in tracked():
        if name.endswith((".py", ".sh", ".md", ".json", ".cfg", ".toml", ".txt", "Makefile")):
            found = outside.search((ROOT / name).read_text(encoding="utf-8"))
            assert not found, f"{name}: {found[0]}"


def test_no_remote_code_no_unsafe_loading():
    """Minimum security rules, as a grep over everything that ships."""
    forbidden = [r"trust_remote_code=True", r"\bpickle\b\.", r"yaml\.load\(", r"\beval\(", r"shell=True", r"extractall"]
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for pattern in forbidden:
            hits = [m for m in re.finditer(pattern, text) if not text[: m.start()].endswith((".", "model"))]
            assert not hits, f"{path}: {pattern}"
        for call in re.finditer(r"torch\.load\(([^)]*)\)", text):
            assert "weights_only=True" in call[1], f"{path}: torch.load without weights_only=True"
