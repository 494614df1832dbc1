"""A normal run prints what this package has to say, and progress bars; nothing of libraries that nobody can act on."""

import logging
import re
import sys
import warnings

import pytest

from llava_moslora.noise import LINES, quiet_libraries
from support.launching import flags, run

BAR = r"[^|]*\d+%\|.*"  # tqdm
OURS = {
    "prepare_data.py": [
        r"conversation template: \w+", r"records: .*", r"report: .*/report\.html", BAR, r"prepared .*data\.json: .*",
    ],
    "train_vit_llm.py": [
        r"device: .*", r"conversation template: \w+", r"data: records \d+.*", BAR, r"part +parameters +trained .*",
        r"(LLM|vision tower|projector|LM head|all) +[\d,]+ .*", r"trained: .*",
    ],
    "export.py": [BAR, r"proof of hf: passed: the merge is exact: .*", r"exported: .*"],
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
