"""JSONL files of a run with a row per step, also after a kill and a resume: metrics, sample answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

from llava_moslora.files.disk import naming, replace_file
from llava_moslora.files.json import parse_json

METRICS_FILE = "metrics.jsonl"


def append_row(file: Path, row: dict) -> None:
    """Append one row in one write, so that a kill leaves at most one unfinished line, at the end.

    JSON has no NaN or Inf (with fp16, loss scaling logs gradient norms of Inf): they are written as text.
    """
    row = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    with naming(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(file: Path) -> list[dict]:
    """The rows of a file that :func:`append_row` wrote. Unfinished (after a kill) and damaged lines are skipped: a lost
    log line must not stop anything."""
    return _read(file)[0]


def _read(file: Path) -> tuple[list[dict], int]:
    """The rows, and the number of damaged lines."""
    if not file.is_file():
        return [], 0
    *lines, _unfinished = file.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [row for line in lines if (row := _parse(line)) is not None]
    return rows, len(lines) - len(rows)


def _parse(line: str) -> dict | None:
    try:
        row = parse_json(line, finite=False)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def delete_rows_after(file: Path, step: int) -> None:
    """Delete the rows of later steps, atomically: a kill leaves the old file or the new one."""
    if not file.is_file():
        return
    rows, damaged = _read(file)
    if damaged:
        print(f"{file}: {damaged} damaged lines skipped", flush=True)
    rows = [row for row in rows if row["step"] <= step]
    replace_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
