"""JSON files: one reader of objects that refuses everything else, and two writers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import fsync, replace_file

DOWNLOAD_AGAIN = "copy or download it again"


def read_json(file: Path, code: str | None = None) -> dict[str, Any]:
    """The JSON object in a UTF-8 file.

    Args:
        code: of the refusals, in the place of the two below.

    Raises:
        Refusal: K-MISSING, no such file, or it cannot be read; K-JSON, not valid JSON, or not an object.
    """
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError) as error:
        fix = "download it, or check the path"
        raise Refusal(code or "K-MISSING", "no such file", file=file, fix=fix) from error
    except OSError as error:
        fix = "fix its permissions"
        raise Refusal(code or "K-MISSING", "cannot be read", file=file, found=error.strerror, fix=fix) from error
    except UnicodeDecodeError as error:
        raise Refusal(code or "K-JSON", "not UTF-8", file=file, found=error, fix=DOWNLOAD_AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(code or "K-JSON", "not valid JSON", file=file, found=error, fix=DOWNLOAD_AGAIN) from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise Refusal(code or "K-JSON", "not a JSON object", file=file, found=kind, fix=DOWNLOAD_AGAIN)
    return value


def write_json(path: Path, content: object) -> None:
    path.write_text(_text(content), encoding="utf-8")


def replace_json(path: Path, content: object) -> None:
    """As :func:`write_json`, atomically: whoever reads sees the old file or the new one, also after a power cut."""
    replace_file(path, _text(content).encode())
    fsync(path.parent)


def _text(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
