"""Paths in a run's settings. ``run.json`` has them as they were given, and the directory that the run was started in,
which relative ones refer to: a run can be resumed, exported and evaluated from any directory."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

from llava_moslora.config import HUB, NAMED_FILE, OPEN_CLIP, WILDCARDS

# Fields of the model and data settings of every kind of run
PATHS = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "vae", "data_path", "eval_data_path",
         "image_folder", "class_image_folder")  # fmt: skip


def located(settings: Any, folder: str | None) -> Any:
    """A copy of model or data ``settings`` with absolute paths.

    Args:
        folder: the base of relative paths; None (for a run of an earlier version): the current directory. The current
            directory is also used for a file that is in it and no longer in ``folder``, as after a whole project was
            moved.
    """
    given = {name: getattr(settings, name) for name in PATHS if getattr(settings, name, None)}
    return replace(settings, **{name: _located(name, value, folder) for name, value in given.items()})


def located_path(path: str, folder: str | None) -> str:
    """One path, made absolute by the rule of :func:`located`."""
    here, there = os.path.abspath(path), os.path.abspath(os.path.join(folder or "", path))
    return here if _exists(here) and not _exists(there) else there


def _located(name: str, value: Any, folder: str | None) -> Any:
    if isinstance(value, list):
        return [_located(name, one, folder) for one in value]
    before, path = _parts(name, value, folder)
    found = located_path(path, folder)
    # ARCH@TAG, where no file has the tag's name, which a folder may have
    is_tag = before.startswith(OPEN_CLIP) and before.endswith("@") and not os.path.isfile(found)
    return value if is_tag or "://" in path or path.startswith(HUB) else before + found


def _parts(name: str, value: str, folder: str | None = None) -> tuple[str, str]:
    """The prefix of a path, and the path: ``open_clip:ARCH@FILE``; ``NAME=FILE`` of validation data, unless a file
    here or in ``folder`` has all of that as its name."""
    if name == "vision_tower" and value.startswith(OPEN_CLIP):
        path = value.removeprefix(OPEN_CLIP)
        path = path.partition("@")[2] or path
    elif name == "eval_data_path" and (named := NAMED_FILE.fullmatch(value)):
        is_file = os.path.exists(value) or os.path.exists(os.path.join(folder or "", value))
        path = value if is_file else named[2]
    else:
        path = value
    return value.removesuffix(path), path


def _exists(path: str) -> bool:
    """Whether it is there; of a pattern, the folder in front of it."""
    pattern = re.split(rf"[{re.escape(WILDCARDS)}]", path)
    return os.path.exists(path) or (len(pattern) > 1 and os.path.exists(os.path.dirname(pattern[0])))


def same_paths(one: Any, other: Any) -> set[str]:
    """The settings that refer to the same files in both of two :func:`located` ones, with links resolved."""
    return {name for name in PATHS if hasattr(one, name) and _followed(name, one) == _followed(name, other)}


def _followed(name: str, settings: Any) -> list[tuple[str, str]]:
    value = getattr(settings, name)
    parts = [_parts(name, one) for one in (value if isinstance(value, list) else [value]) if one]
    return [(before, path if "://" in path else os.path.realpath(path)) for before, path in parts]
