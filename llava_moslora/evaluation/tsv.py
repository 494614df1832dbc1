"""Reader of VLMEvalKit's TSV files: the text of every row in memory, images decoded only when they are asked for.

UTF-8, tab-separated, ``csv`` quoting (doubled quotes, newlines inside fields), one header line. ``image`` holds

- base64 of an image file, or a list literal of several, or
- at most 64 characters: the ``index`` of the row that holds the image (the rotations of a question share one), or
- nothing: VLMEvalKit leaves such a row out, and so does this reader, with a warning.

A file without an ``image`` column names files in ``image_path``. Only the empty field is missing; VLMEvalKit reads with
pandas, for which the option text ``None`` is missing too (see :func:`hidden_by_pandas`).

Source: VLMEvalKit's ``vlmeval/dataset/image_base.py``.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from llava_moslora.data.images import load_bytes, load_image
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.rows import LETTERS, Row, literal_list

MAX_REFERENCE = 64  # characters of an `image` field that is an index and no image
MAX_FIELD = 32 * 2**20  # characters of one field, so of an image of 24 MB
MAX_TEXT = 2**20  # characters of a field that is no image
# Values that pandas.read_csv treats as missing besides the empty field.
PANDAS_MISSING = frozenset(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null".split("|")
)

_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and bytes that are no UTF-8

log = logging.getLogger(__name__)


class Table:
    """One TSV file.

    Attributes:
        path: the file.
        md5: of the whole file, as hexadecimal digits.
        columns: names from the header. In lower case but for option letters, as VLMEvalKit compares them.
        rows: one dict per question that has an image, in the file's order.

    Args:
        image_folder: where files named by ``image_path`` are; by default ``images/NAME`` next to ``NAME.tsv``.

    Raises:
        Refusal: D-FILE, D-ENC, D-PARSE, D-SCHEMA, D-INDEX or D-IMAGES, with file, row (from 0) and column.
    """

    def __init__(self, path: str | Path, image_folder: str | Path | None = None):
        self.path = Path(path)
        self.image_folder = self.path.parent / "images" / self.path.stem if image_folder is None else Path(image_folder)
        self.rows: list[Row] = []
        self._records: list[int] = []  # for every row its number in the file; without rows left out the same
        self._offsets: list[int] = []  # byte offset of its record
        references = self._read()
        self._holders = self._resolve(references)

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, number: int) -> list[Image.Image]:
        """The images of row ``number`` of :attr:`rows`, upright and in RGB.

        Raises:
            Refusal: I-..., or D-IMAGES where the field is no base64, or I-CHANGED.
        """
        holder = self._holders[number]
        if holder is None:
            return [load_image(name, self.image_folder, **self._where(number)) for name in self._image_names(number)]
        images = []
        for text in _list_of_base64(self._image_field(holder)):
            try:
                data = base64.b64decode("".join(text.split()), validate=True)
            except ValueError as error:
                raise self.refusal(holder, "image", "no base64", code="D-IMAGES", found=error) from None
            images.append(load_bytes(data, str(self.path), **self._where(holder)))
        return images

    def refusal(self, number: int, column: str, what: str, *, code: str = "D-SCHEMA", **parts: Any) -> Refusal:
        """A refusal that names the file, row ``number`` and ``column``."""
        return Refusal(code, what, file=self.path, key=column, **self._where(number), **parts)

    def _where(self, number: int) -> dict[str, Any]:
        return {"record": self._records[number], "record_id": self.rows[number]["index"]}

    def _read(self) -> list[str | None]:
        """Fill rows and offsets; for every row the index that its ``image`` refers to, "" if it holds the image
        itself, None if the file has no such column."""
        if not self.path.is_file():
            raise Refusal("D-FILE", "no such file", file=self.path)
        digest, references, without = hashlib.md5(usedforsecurity=False), [], []
        with open(self.path, "rb") as file:
            records = _records(file, self.path, digest)
            _, header = next(records, (0, None))
            self.columns = self._check_header(header)
            image = self.columns.index("image") if "image" in self.columns else None
            for number, (offset, fields) in enumerate(records):
                row, text = self._row(number, fields, image)
                if text == "":
                    without.append(number)
                    continue
                self.rows.append(row)
                self._records.append(number)
                self._offsets.append(offset)
                references.append(text if text is None or len(text) <= MAX_REFERENCE else "")
        self.md5 = digest.hexdigest()
        if not self.rows:
            found = f"{len(without)} rows without an image" if without else "only a header"
            raise Refusal("D-SCHEMA", "no question in this file", file=self.path, found=found)
        if without:
            log.warning(
                "%s: %d rows have no image and are left out, as VLMEvalKit does; the first is row %d",
                self.path, len(without), without[0],
            )  # fmt: skip
        return references

    def _check_header(self, header: list[str] | None) -> tuple[str, ...]:
        if header is None:
            raise Refusal("D-SCHEMA", "the file is empty", file=self.path, expected="a header line of column names")
        if wrong := [name for name in header if _NO_TEXT.search(name)]:
            raise Refusal("D-ENC", "the header is not UTF-8 text", file=self.path, key=ascii(wrong[0]))
        columns = tuple(name if name in LETTERS else name.lower() for name in header)
        if double := [name for name in columns if columns.count(name) > 1]:
            raise Refusal("D-SCHEMA", "two columns with the same name", file=self.path, key=double[0])
        if missing := [name for name in ("index", "question") if name not in columns]:
            found = " ".join(columns)[:200]
            raise Refusal("D-SCHEMA", "no such column", file=self.path, key=missing[0], found=found)
        if "image" not in columns and "image_path" not in columns:
            raise Refusal("D-SCHEMA", "no column with images", file=self.path, key="image", expected="or image_path")
        return columns

    def _row(self, number: int, fields: list[str], image: int | None) -> tuple[Row, str | None]:
        """A record as a dict, and its ``image`` field apart from it."""
        where: dict[str, Any] = {"file": self.path, "record": number}
        if len(fields) != len(self.columns):
            column = self.columns[min(len(fields), len(self.columns) - 1)]
            raise Refusal(
                "D-PARSE", "the number of fields differs from the header's", key=column, found=len(fields),
                expected=len(self.columns), fix="the file may be cut off: copy it again", **where,
            )  # fmt: skip
        named = list(zip(self.columns, fields, strict=True))
        if wrong := [name for name, text in named if "\0" in text or (not text.isascii() and _NO_TEXT.search(text))]:
            raise Refusal("D-ENC", "not UTF-8 text", key=wrong[0], **where)
        row = {name: text for name, text in named if text and name != "image"}
        if "index" not in row:
            raise Refusal("D-INDEX", "a row without an index", key="index", **where)
        if long := [name for name, text in row.items() if len(text) > MAX_TEXT]:
            found = f"{len(row[long[0]])} characters"
            raise Refusal("D-SCHEMA", "the field is too long for text", key=long[0], found=found, **where)
        return row, None if image is None else fields[image]

    def _resolve(self, references: Sequence[str | None]) -> list[int | None]:
        """For every row the number of the row that holds its image; None where files hold them."""
        numbers: dict[str, int] = {}
        for number, row in enumerate(self.rows):
            if (first := numbers.setdefault(row["index"], number)) != number:
                what = "an index that another row has"
                raise self.refusal(number, "index", what, code="D-INDEX", found=f"row {first}")
        holders: list[int | None] = []
        for number, reference in enumerate(references):
            if not reference:
                holders.append(None if reference is None else number)
                continue
            target = numbers.get(reference.strip())
            if target is None:
                raise self.refusal(
                    number, "image", "not an image and not the index of a row", code="D-IMAGES", found=reference,
                )  # fmt: skip
            if references[target] and target >= number:
                raise self.refusal(
                    number, "image", "refers to a row that has no image of its own", code="D-IMAGES", found=reference,
                )  # fmt: skip
            holders.append(holders[target] if target < number else target)
        return holders

    def _image_field(self, number: int) -> str:
        """The ``image`` field of a row that holds one, read again from the file."""
        with open(self.path, "rb") as file:
            file.seek(self._offsets[number])
            _, fields = next(_records(file, self.path), (0, []))
        if len(fields) != len(self.columns) or fields[self.columns.index("index")] != self.rows[number]["index"]:
            raise self.refusal(number, "image", "the file changed while it was read", code="I-CHANGED")
        return fields[self.columns.index("image")]

    def _image_names(self, number: int) -> list[str]:
        text = self.rows[number].get("image_path", "")
        names = literal_list(text) if text[:1] == "[" else [text]
        if not names or not all(isinstance(name, str) and name for name in names):
            raise self.refusal(number, "image_path", "no file name", code="D-IMAGES", found=text)
        return names


def hidden_by_pandas(table: Table) -> list[int]:
    """Rows in which pandas, and so VLMEvalKit, treats the text of an option, hint or answer as missing.

    The option ``None`` is the usual case: VLMEvalKit does not show it to the model, this package does.
    """
    shown = [column for column in table.columns if column in LETTERS or column in ("hint", "answer", "question")]
    return [n for n, row in enumerate(table.rows) if any(row.get(column) in PANDAS_MISSING for column in shown)]


def _list_of_base64(text: str) -> list[str]:
    if text[0] != "[" or text[-1] != "]":
        return [text]
    return [part.strip().strip("'\"") for part in text[1:-1].split(",")]  # base64 has neither commas nor quotes


def _records(file: BinaryIO, path: Path, digest: Any = None) -> Iterator[tuple[int, list[str]]]:
    """Byte offset and fields of every record from the file's position on; blank lines are left out, as by pandas.

    Bytes that are no UTF-8 come as surrogates.
    """
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD))  # one setting for the process: only ever raised
    lines, number = _Lines(file, path, digest), -1  # the header is no row
    reader = csv.reader(lines, delimiter="\t", strict=True)
    while True:
        offset, line = lines.position, lines.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise Refusal(
                "D-PARSE", "not a TSV with csv quoting", file=path, record=max(number, 0), key=f"line {line}",
                found=error, expected="fields with tabs, newlines or quotes in quotes, quotes inside doubled",
            ) from None  # fmt: skip
        if fields:
            number += 1
            yield offset, fields


class _Lines:
    """Lines for ``csv.reader``, which asks for one after another until a record is whole: ``position`` is then the
    byte offset of that record's end."""

    def __init__(self, file: BinaryIO, path: Path, digest: Any):
        self.file, self.path, self.digest = file, path, digest
        self.position, self.number = file.tell(), 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline(2 * MAX_FIELD)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) == 2 * MAX_FIELD and line[-1:] != b"\n":
            found = f"more than {len(line)} bytes"
            raise Refusal("D-PARSE", "the line is too long", file=self.path, key=f"line {self.number}", found=found)
        if self.digest is not None:
            self.digest.update(line)
        text = line.decode("utf-8-sig" if self.position == 0 else "utf-8", "surrogateescape")
        self.position += len(line)
        return text
