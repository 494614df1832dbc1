"""One wrong file out of a right one: changes that know JSON, YAML and tables, and changes of any file's bytes."""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

RAW = "@@raw-{}@@"  # stands for a text that json.dumps would not write
RAW_TEXTS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-0", "9" * 5000, "1" + "0" * 310, "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000, "[" * 200_000, '"\\ud83d"', '"\\u0000"', '"\t"', "tru", "'single'", "",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1e-320, 1e308, 2**31 - 1, 2**31, 2**53, 2**63, -(2**63),
    10**9, 10**14, 10**18, "", " ", "x", "0", "-1", "None", "null", "auto", "é\u202e", "a" * 100_000,
    "../../etc/passwd", "/dev/zero", "http://127.0.0.1:9/x", "{{ 1 }}", "<image>", "</s>", [], {}, [None], [[]],
    [{}], {"": ""}, {"a": {"b": []}}, [0] * 1000, ["x"] * 1000, [1, "x", None, {}], list(range(50_000)),
]  # fmt: skip


def keys(count: int) -> dict[str, int]:
    return {f"key{number}": number for number in range(count)}


def change_json(value: Any, chance: random.Random) -> str:
    """One to three changes somewhere in ``value``, as JSON text."""
    value = json.loads(json.dumps(value))
    raws: list[str] = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = _changed(value, chance, raws)
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    for number, raw in enumerate(raws):
        text = text.replace(f'"{RAW.format(number)}"', raw)
    if chance.random() < 0.1 and (names := re.findall(r'"\w+": ', text)):  # a key twice
        name = chance.choice(names)
        text = text.replace(name, f"{name}{chance.choice(('0', 'null', '[]', '{}'))}, {name}", 1)
    return text


def _changed(value: Any, chance: random.Random, raws: list[str]) -> Any:
    if isinstance(value, dict) and value and chance.random() < 0.85:
        value = dict(value)
        name = chance.choice(list(value))
        kind = chance.choice(("into", "into", "into", "into", "drop", "rename", "add", "swap", "many"))
        if kind == "into":
            value[name] = _changed(value[name], chance, raws)
        elif kind == "drop":
            del value[name]
        elif kind == "rename":
            value[chance.choice((name + "s", name.upper(), "", name[:-1], "é", "\0"))] = value.pop(name)
        elif kind == "add":
            value[chance.choice(("auto_map", "quantization_config", "extra", "", "__class__", "0"))] = _any(
                chance, raws
            )
        elif kind == "swap":
            other = chance.choice(list(value))
            value[name], value[other] = value[other], value[name]
        elif chance.random() < 0.1:
            value |= keys(200_000)
        return value
    if isinstance(value, list) and value and chance.random() < 0.85:
        value = list(value)
        at = chance.randrange(len(value))
        kind = chance.choice(("into", "into", "into", "drop", "double", "add", "cut"))
        if kind == "into":
            value[at] = _changed(value[at], chance, raws)
        elif kind == "drop":
            del value[at]
        elif kind == "double":
            value.insert(at, value[at])
        elif kind == "add":
            value.insert(at, _any(chance, raws))
        else:
            del value[at:]
        return value
    if isinstance(value, bool) or value is None or chance.random() < 0.6:
        return _any(chance, raws)
    if isinstance(value, str):
        at = chance.randrange(len(value) + 1)
        extra = chance.choice(("\0", "\ud83d", "\n", "\r", "\u2028", '"', "\\", "../", "%s", "{x}", "x" * 70_000, "é"))
        return chance.choice((value[:at], value + value, value[:at] + extra + value[at:], value.upper(), [value]))
    if isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2, value / 2, value * 10**6, str(value), float(value), [value])
        return chance.choice(near)
    return _any(chance, raws)


def _any(chance: random.Random, raws: list[str]) -> Any:
    if chance.random() < 0.35:
        raws.append(chance.choice(RAW_TEXTS))
        return RAW.format(len(raws) - 1)
    return chance.choice(VALUES)


def change_text(content: bytes, chance: random.Random) -> bytes:
    """Another encoding, lines dropped, doubled, swapped, lengthened."""
    text = content.decode("utf-8", "replace")
    lines = text.splitlines(keepends=True) or [""]
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    kind = chance.choice(
        ("encode", "encode", "drop", "double", "swap", "value", "long", "separators", "repeat", "join")
    )
    if kind == "encode":
        encoding = chance.choice(("utf-16", "utf-8-sig", "utf-32", "latin-1", "cp1252"))
        return ("é" + text if chance.random() < 0.5 else text).encode(encoding, "replace")
    if kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "value":
        words = re.findall(r"[^\s:,\t\"]+", lines[at]) or [""]
        new = chance.choice(
            ("", "-1", "1e999", "nan", "9" * 400, "null", "~", "!!python/object/apply:os.system ['x']", "&a [*a]",
             "0x10", "1:30", "[[", "{a: {b: [", "- ", "\t", "'", '"', "|", "\0", "\x1b[31m", "2**9", "*x",
             "é" * 9, "${HOME}")
        )  # fmt: skip
        lines[at] = lines[at].replace(chance.choice(words), new, 1)
    elif kind == "long":
        lines[at] = lines[at].rstrip("\n") + "x" * chance.choice((1000, 100_000, 2_000_000)) + "\n"
    elif kind == "separators":
        lines[at] = (
            lines[at].replace("\t", chance.choice((" ", ",", "\t\t"))).replace(":", chance.choice((" ", "::", "")))
        )
    elif kind == "repeat":
        lines = lines[:at] + [lines[at]] * chance.choice((10, 1000)) + lines[at:]
    else:
        lines = ["".join(lines).replace("\n", chance.choice(("", "\r", "\r\n", "\n\n", "\x85")))]
    return "".join(lines).encode("utf-8", "surrogatepass")


def change_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bits flipped, cut, grown, nothing, noise, numbers at the start overwritten."""
    data = bytearray(content)
    size = len(data)
    kind = chance.choice(("flip", "flip", "cut", "cut", "grow", "empty", "noise", "zeros", "start", "insert", "remove"))
    at = chance.randrange(size) if size else 0
    if kind == "flip" and size:
        for _ in range(chance.choice((1, 1, 3, 20))):
            data[chance.randrange(size)] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[chance.choice((at, min(at, 64), max(size - 1, 0))) :]
    elif kind == "grow":
        data += chance.randbytes(chance.choice((1, 8, 4096)))
    elif kind == "empty":
        data.clear()
    elif kind == "noise":
        data = bytearray(chance.randbytes(chance.choice((1, 8, 100, 5000))))
    elif kind == "zeros":
        data[at : at + chance.choice((1, 8, 512))] = bytes(len(data[at : at + 8]))
    elif kind == "start":  # where a size is declared
        number = chance.choice((0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1, 100_000_000))
        data[:8] = number.to_bytes(8, chance.choice(("little", "big")))
    elif kind == "insert":
        data[at:at] = chance.choice((b"\0", b"\xff", b"\n", b"\xed\xa0\x80", bytes(4096), b"\xef\xbb\xbf"))
    else:
        del data[at : at + chance.choice((1, 16, 512))]
    return bytes(data)


def change_safetensors(content: bytes, chance: random.Random) -> bytes:
    """The header, which is JSON, changed; its declared length right or wrong."""
    length = int.from_bytes(content[:8], "little")
    header = change_json(json.loads(content[8 : 8 + length]), chance).encode("utf-8", "surrogatepass")
    declared = chance.choice((len(header), len(header), len(header), len(header) + 1, 2**40, 0))
    return declared.to_bytes(8, "little") + header + content[8 + length :]


def change_tar(content: bytes, chance: random.Random) -> bytes:
    """A member renamed, doubled, of another kind, with another declared size, or pax headers of any number."""
    source = tarfile.open(fileobj=io.BytesIO(content))  # noqa: SIM115 (in memory)
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=chance.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    ) as archive:
        members = source.getmembers()
        chosen = chance.randrange(len(members))
        for number, member in enumerate(members):
            body = source.extractfile(member).read()  # type: ignore[union-attr]
            if number == chosen:
                kind = chance.choice(("name", "type", "pax", "double", "json", "drop", "bomb"))
                if kind == "name":
                    member.name = chance.choice(
                        (
                            "../x.json",
                            "/x.png",
                            "x" * 300,
                            "é\ud83d".encode("utf-8", "surrogatepass").decode("utf-8", "replace"),
                            "a.json",
                        )
                    )
                elif kind == "type":
                    member.type = chance.choice(
                        (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE)
                    )
                    member.linkname = "/etc/passwd"
                elif kind == "pax":
                    size = chance.choice(("-1", "1e9", "x", str(10**14), str(2**63), "GNU", "9" * 5000))
                    member.pax_headers = {
                        chance.choice(("size", "path", "mtime", "GNU.sparse.size", "GNU.sparse.map")): size
                    }
                elif kind == "double":
                    archive.addfile(member, io.BytesIO(body))
                elif kind == "json" and member.name.endswith("json"):
                    body = change_json(json.loads(body), chance).encode("utf-8", "surrogatepass")
                    member.size = len(body)
                elif kind == "bomb":
                    body = bytes(30_000_000)
                    member.size = len(body)
                elif kind == "drop":
                    continue
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def change_zip(content: bytes, chance: random.Random) -> bytes:
    """A torch file: one member replaced by noise, doubled, left out, or a bomb."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        names = source.namelist()
        chosen = chance.choice(names)
        for name in names:
            body, how = source.read(name), zipfile.ZIP_STORED
            if name == chosen:
                kind = chance.choice(("noise", "drop", "bytes", "bytes", "bomb", "rename"))
                if kind == "drop":
                    continue
                if kind == "bomb":
                    body, how = bytes(50_000_000), zipfile.ZIP_DEFLATED
                elif kind == "rename":
                    name = chance.choice(("../x", "archive/data.pkl", "x" * 1000))
                else:
                    body = change_bytes(body, chance) if kind == "bytes" else chance.randbytes(100)
            target.writestr(zipfile.ZipInfo(name), body, how)
    return buffer.getvalue()


def change_records(content: bytes, chance: random.Random) -> bytes:
    """JSONL: one line changed as JSON."""
    lines = content.decode().splitlines()
    at = chance.randrange(len(lines))
    lines[at] = change_json(json.loads(lines[at]), chance)
    return ("\n".join(lines) + chance.choice(("\n", ""))).encode("utf-8", "surrogatepass")


def _json_bytes(content: bytes, chance: random.Random) -> bytes:
    return change_json(json.loads(content), chance).encode("utf-8", "surrogatepass")


STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json_bytes,
    "jsonl": change_records,
    "safetensors": change_safetensors,
    "tar": change_tar,
    "zip": change_zip,
    "text": change_text,
}


def mutate(content: bytes, kind: str, chance: random.Random) -> bytes:
    """Mostly by structure, else as text or as bytes. ``kind``: a key of :data:`STRUCTURED`, or "bytes"."""
    how = chance.random()
    if kind in STRUCTURED and how < 0.8:
        return STRUCTURED[kind](content, chance)
    if kind in ("json", "jsonl", "text") and how < 0.92:
        return change_text(content, chance)
    return change_bytes(content, chance)
