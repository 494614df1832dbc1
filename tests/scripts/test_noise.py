"""A normal run prints what this package has to say, and progress bars; nothing of libraries that nobody can act on."""

import ast
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest

from llava_moslora.noise import LINES, quiet_libraries
from support.launching import ROOT, flags, run

PROGRAMS = sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("playground/*.py")])
NOT_QUIET = {"swift_moslora.py": "ms-swift's process, which decides for itself"}
BAR = r"[^|]*\d+%\|.*"  # tqdm
OURS = {
    "prepare_data.py": [
        r"conversation template: \w+", r"record format of .*", r"data: records: \d+.*", r"report: .*/report\.html", BAR,
        r"prepared .*data\.json: records: \d+.*",
    ],
    "train_vit_llm.py": [
        r"device: .*", r"conversation template: \w+", r"record format of .*", r"data: records: \d+.*", BAR,
        r"part +parameters +trained .*", r"(LLM|vision tower|projector|LM head|all) +[\d,]+ .*", r"training into .*",
        r"trained: .*",
    ],
    "export.py": [BAR, r"verification of hf: passed: the merge is exact: .*", r"exported: .*"],
    "chat.py": [BAR, r"you> .*", r"answer.*"],
}  # fmt: skip


def strange(script: str, output: str) -> list[str]:
    lines = [line for line in re.split(r"[\r\n]+", output) if line.strip()]
    return [line for line in lines if not any(re.fullmatch(pattern, line.strip()) for pattern in OURS[script])]


@pytest.mark.slow
def test_a_normal_run_prints_only_lines_of_this_package(parts, tmp_path):
    data = flags(parts, tmp_path / "run")
    only = ("--model_name_or_path", "--vision_tower", "--data_path", "--image_folder", "--data_cache")
    prepared = [
        word for flag, value in zip(data[::2], data[1::2], strict=True) if flag in only for word in (flag, value)
    ]
    commands = {
        "prepare_data.py": [*prepared, "--report_dir", str(tmp_path / "report")],
        "train_vit_llm.py": data,
        "export.py": [str(tmp_path / "run"), "--output_dir", str(tmp_path / "merged")],
    }
    for script, words in commands.items():
        done = run([sys.executable, f"scripts/{script}", *words])
        assert done.returncode == 0, done.stderr
        assert strange(script, done.stdout + "\n" + done.stderr) == []


def test_what_is_strange_is_found():
    assert strange("export.py", "exported: a (hf)\rmerging: 100%|███| 1/1\nFailed to load kernels") == [
        "Failed to load kernels"
    ]


def test_only_the_named_lines_are_left_out(recwarn):
    shown: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    loggers = {line.logger: logging.getLogger(line.logger) for line in LINES}
    before = {name: (logger.filters[:], logger.handlers[:]) for name, logger in loggers.items()}
    try:
        for logger in loggers.values():
            logger.handlers = [handler]
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            quiet_libraries()
            for line in LINES:
                loggers[line.logger].warning("%s: of this machine", line.words)
                loggers[line.logger].warning("another line")
            old = "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use another"
            warnings.warn(old, FutureWarning, stacklevel=1)
            warnings.warn("another", FutureWarning, stacklevel=1)
    finally:
        for name, logger in loggers.items():
            logger.filters, logger.handlers = before[name]
    assert shown == ["another line"] * len(LINES)
    assert [str(warning.message) for warning in recwarn] == ["another"]


def imported_at_once(path: Path) -> set[str]:
    """Modules that a file imports when it is imported itself, with what those of this package import."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        for node in ast.parse(waiting.pop().read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in set(names) - found:
                found.add(name)
                file = ROOT / f"{name.replace('.', '/')}.py"
                waiting += [file] if file.is_file() else []
    return found


def is_quiet(path: Path) -> bool:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return any(isinstance(call.func, ast.Name) and call.func.id == "quiet_libraries" for call in calls)


def test_every_program_that_imports_peft_makes_it_quiet():
    loud = {path.name for path in PROGRAMS if "peft" in imported_at_once(path) and not is_quiet(path)}
    assert loud == set(NOT_QUIET)
    assert is_quiet(ROOT / "playground/demo_report.py") and not is_quiet(ROOT / "playground/ask_stock.py")


@pytest.mark.slow
def test_the_demos_table_says_nothing_of_libraries():
    done = run([sys.executable, "playground/demo_report.py", "--help"])
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and done.stderr == ""
