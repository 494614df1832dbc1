"""Reads the file of ``--config``, or another YAML or JSON file, with every value as its literal text.

YAML 1.1 reads ``2025_11_03`` as 20251103, ``0012`` as 10, ``no`` as False and ``1:30`` as 90. Here the command line's
parser converts the text to the type of its flag. A flag whose value is ``null`` counts as not given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from llava_moslora.errors import Refusal

NULLS = ("", "~", "null", "Null", "NULL")
LARGEST = 1 << 17  # bytes, because the parser is slow
STR, SEQ, MAP = (f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))


def read_config(path: Path) -> dict[str, str | list[str]]:
    """Key → text or list of texts; a mapping becomes JSON, as flags that take a mapping expect it.

    Raises:
        Refusal: C-PATH, there is no such file, or it cannot be read; C-PARSE, not a mapping in UTF-8, a key twice, a
            tag or an alias, ``null`` or a list inside a list.
    """
    node = _mapping(path, "--config", "flags to values")
    given = {key: value for key, value in _pairs(node, path).items() if not _is_null(value)}
    return {key: _as_text(value, key, path) for key, value in given.items()}


def read_texts(path: Path, key: str, what: str) -> dict[str, Any]:
    """Mappings, lists and texts as nested in the file; None for an empty value or ``null``.

    Args:
        key: the flag of the file. what: what the file maps, for the refusal.

    Raises:
        Refusal: C-PATH, C-PARSE, as :func:`read_config`.
    """
    return _nested(_mapping(path, key, what), path)


def _mapping(path: Path, key: str, what: str) -> yaml.MappingNode:
    if not path.is_file():
        raise Refusal("C-PATH", "no such file", file=path, key=key)
    try:
        if (size := path.stat().st_size) > LARGEST:
            expected = f"at most {LARGEST} bytes: one line for each flag"
            raise Refusal("C-PARSE", "too large", file=path, found=f"{size} bytes", expected=expected)
        text = path.read_text(encoding="utf-8-sig")
        node = _TextLoader(text).get_single_node()  # JSON is YAML
        if not isinstance(node, yaml.MappingNode):
            found = "nothing" if node is None else node.id
            raise Refusal("C-PARSE", f"not a mapping of {what}", file=path, found=found)
        return node
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        raise Refusal("C-PARSE", "not UTF-8", file=path, found=found, fix="save the file as UTF-8") from error
    except OSError as error:
        raise Refusal("C-PATH", "cannot be read", file=path, key=key, found=error.strerror) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise Refusal("C-PARSE", "neither YAML nor JSON", file=path, found=_in_one_line(error)) from error


def _in_one_line(error: Exception) -> str:
    """What a parser has to say, after line and column, counted from 1 as editors do."""
    if isinstance(error, RecursionError):
        return "too many brackets inside each other"
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark) is not None:
        said = ", ".join(filter(None, [error.context, error.problem]))
        return f"line {mark.line + 1}, column {mark.column + 1}: {said}"
    return " ".join(str(error).split())


class _TextLoader(yaml.SafeLoader):
    """YAML without code, types (a scalar is its text) and aliases (which can expand ten lines to a billion values)."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (as PyYAML declares it)

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError(f"an alias, *{self.peek_event().anchor}, which is not supported")
        node = super().compose_node(parent, index)
        if node.tag not in (STR, SEQ, MAP):
            raise yaml.YAMLError(f"the tag {node.tag}, which is not supported")
        return node


def _nested(node: yaml.Node, path: Path) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key: _nested(value, path) for key, value in _pairs(node, path).items()}
    if isinstance(node, yaml.SequenceNode):
        return [_nested(value, path) for value in node.value]
    return None if _is_null(node) else node.value


def _pairs(node: yaml.MappingNode, path: Path) -> dict[str, yaml.Node]:
    pairs: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise Refusal("C-PARSE", "a key that is not text", file=path, found=f"line {key.start_mark.line + 1}")
        if key.value in pairs:
            lines = f"lines {pairs[key.value].start_mark.line + 1} and {key.start_mark.line + 1}"
            raise Refusal("C-PARSE", "the key occurs twice", file=path, key=key.value, found=lines, fix="keep one")
        pairs[key.value] = value
    return pairs


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value in NULLS


def _as_text(node: yaml.Node, key: str, path: Path) -> str | list[str]:
    if isinstance(node, yaml.MappingNode):
        return json.dumps(_as_json(node, path))
    if isinstance(node, yaml.ScalarNode):
        return node.value
    for item in node.value:
        if not isinstance(item, yaml.ScalarNode) or _is_null(item):
            found = "null" if isinstance(item, yaml.ScalarNode) else item.id
            raise Refusal("C-PARSE", "a list holds plain values only", file=path, key=key, found=found)
    return [item.value for item in node.value]


def _as_json(node: yaml.Node, path: Path) -> object:
    """The value inside a mapping, with JSON's types."""
    if isinstance(node, yaml.MappingNode):
        return {key: _as_json(value, path) for key, value in _pairs(node, path).items()}
    if isinstance(node, yaml.SequenceNode):
        return [_as_json(value, path) for value in node.value]
    if node.style:
        return node.value
    if _is_null(node):
        return None
    if node.value.lower() in ("true", "false"):
        return node.value.lower() == "true"
    try:
        return json.loads(node.value, parse_constant=str)
    except ValueError:
        return node.value
