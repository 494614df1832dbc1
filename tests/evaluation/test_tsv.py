"""The reader of TSV files: what is read, and every malformed file as one refusal that names file, row and column."""

import base64
import csv
import hashlib
import io
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import llava_moslora.evaluation.tsv as reader
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.tsv import PANDAS_MISSING, Table, hidden_by_pandas
from support.golden_cases import image, tsv

COLUMNS = ["index", "image", "question", "A", "B", "answer"]


def row(number, **fields):
    return {
        "index": str(number), "image": image(number), "question": "what?", "A": "red", "B": "blue", "answer": "A",
    } | fields  # fmt: skip


def written(folder, content):
    path = folder / "X.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def table(folder, *rows, columns=COLUMNS):
    return Table(written(folder, tsv(columns, list(rows))))


def colour(image):
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def expected_colour(number):
    return (number * 37 % 256, number * 91 % 256, number * 17 % 256)


def test_fields_are_read_as_they_are(tmp_path):
    strange = 'a\t"b"\nc\r\nd'
    found = table(
        tmp_path, row(7, question=strange, A="007", B="1.50"), row(8, A="None", B=" "), row(9, answer="", B="数字")
    )
    assert found.rows[0] == {"index": "7", "question": strange, "A": "007", "B": "1.50", "answer": "A"}
    assert found.rows[1]["A"] == "None" and found.rows[1]["B"] == " "  # only the empty field is missing
    assert "answer" not in found.rows[2] and found.rows[2]["B"] == "数字"
    assert hidden_by_pandas(found) == [1]
    assert found.md5 == hashlib.md5((tmp_path / "X.tsv").read_bytes()).hexdigest()
    assert [colour(found.images(k)[0]) for k in range(3)] == [expected_colour(n) for n in (7, 8, 9)]


def test_images_by_reference_in_lists_and_in_files(tmp_path):
    two = str([image(4), image(5)])
    found = table(tmp_path, row(1, image="2"), row(2), row(3, image="2"), row(4, image=two), row(5, image="3"))
    assert [[colour(i) for i in found.images(k)] for k in range(5)] == [
        [expected_colour(n) for n in numbers] for numbers in ((2,), (2,), (2,), (4, 5), (2,))
    ]
    folder = tmp_path / "images" / "X"
    folder.mkdir(parents=True)
    for name, value in (("a.png", 10), ("b.png", 20)):
        Image.new("L", (3, 2), value).save(folder / name)
    rows = [row(1, image_path="a.png"), row(2, image_path="['a.png', 'b.png']")]
    found = table(tmp_path, *rows, columns=["index", "image_path", "question"])
    assert [colour(i) for i in (*found.images(0), *found.images(1))] == [(10,) * 3, (10,) * 3, (20,) * 3]


def test_what_else_a_file_may_have(tmp_path, caplog):
    plain = tsv(COLUMNS, [row(1), row(2, image=""), row(3)])
    found = Table(
        written(tmp_path, b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").replace("what?\t", "what?\t").encode())
    )
    assert [r["index"] for r in found.rows] == ["1", "3"] and "1 rows have no image" in caplog.text
    with pytest.raises(Refusal) as refused:  # rows are named by their number in the file
        raise found.refusal(1, "answer", "wrong")
    assert refused.value.record == 2 and refused.value.record_id == "3"
    found = Table(written(tmp_path, "\n" + plain.replace("\n", "\n\n").rstrip("\n")))
    assert len(found) == 2 and colour(found.images(1)[0]) == expected_colour(3)
    found = Table(written(tmp_path, plain.replace("question", "Question", 1)))
    assert found.columns == tuple(COLUMNS)


def half_a_png():
    file = io.BytesIO()
    Image.frombytes("L", (64, 64), random.Random(0).randbytes(64 * 64)).save(file, "PNG")
    return base64.b64encode(file.getvalue()[: file.tell() // 2]).decode()


HEADER = "index\timage\tquestion\n"
LINE = f"1\t{image(1)}\twhat?\n"


@pytest.mark.parametrize(
    "content, code, record, key",
    [
        ("", "D-SCHEMA", None, None),
        (HEADER, "D-SCHEMA", None, None),
        (HEADER + "1\t\twhat?\n", "D-SCHEMA", None, None),
        ("image\tquestion\n" + LINE, "D-SCHEMA", None, "index"),
        ("index\timage\n" + LINE, "D-SCHEMA", None, "question"),
        ("index\tquestion\n" + LINE, "D-SCHEMA", None, "image"),
        ("index\timage\tquestion\tQuestion\n" + LINE, "D-SCHEMA", None, "question"),
        (HEADER + LINE + "2\t" + image(2)[:-30], "D-PARSE", 1, "question"),
        (HEADER + LINE + "2\t" + image(2) + "\ta\tb\n", "D-PARSE", 1, "question"),
        (HEADER + LINE + '2\t"not closed\twhat?\n' + LINE, "D-PARSE", 1, "line 3"),
        (HEADER + LINE + '2\t"closed" early\twhat?\n', "D-PARSE", 1, "line 3"),
        (HEADER + LINE + f"2\t{image(2)}\tlone\rreturn\n", "D-PARSE", 1, "line 3"),
        (HEADER.encode() + LINE.encode() + f"2\t{image(2)}\t".encode() + b"wh\xe4t?\n", "D-ENC", 1, "question"),
        (HEADER.encode() + b"1\t" + image(1).encode()[:70] + b"\xff\twhat?\n", "D-ENC", 0, "image"),
        (HEADER.encode("utf-16"), "D-ENC", None, None),
        (HEADER + LINE + f"\t{image(2)}\twhat?\n", "D-INDEX", 1, "index"),
        (HEADER + LINE + LINE, "D-INDEX", 1, "index"),
        (HEADER + LINE + "2\t3\twhat?\n", "D-IMAGES", 1, "image"),
        (HEADER + LINE + "2\t2\twhat?\n", "D-IMAGES", 1, "image"),
        (HEADER + LINE + "2\t3\twhat?\n3\t1\twhat?\n", "D-IMAGES", 1, "image"),
        (HEADER + LINE + "2\t3\twhat?\n3\t2\twhat?\n", "D-IMAGES", 1, "image"),
        (HEADER + LINE + f"2\t{image(2)}\t{'long ' * 210_000}\n", "D-SCHEMA", 1, "question"),
    ],
)
def test_malformed_files(tmp_path, content, code, record, key):
    path = written(tmp_path, content)
    with pytest.raises(Refusal) as refused:
        Table(path)
    refusal = refused.value
    assert (refusal.code, refusal.record) == (code, record) and refusal.file == path
    assert key is None or refusal.key == key


def test_a_nul_and_a_missing_file(tmp_path):
    with pytest.raises(Refusal) as refused:
        Table(written(tmp_path, HEADER + LINE + f"2\t{image(2)}\tnul\0\n"))
    assert refused.value.code in ("D-ENC", "D-PARSE") and refused.value.record == 1
    with pytest.raises(Refusal, match="no such file"):
        Table(tmp_path / "Y.tsv")


@pytest.mark.parametrize(
    "field, code",
    [
        ("!" * 70, "D-IMAGES"),
        (image(1)[:-3], "D-IMAGES"),
        (base64.b64encode(b"no image" * 10).decode(), "I-FORMAT"),
        (half_a_png(), "I-DECODE"),
        (f"['{image(1)}', '{'?' * 70}']", "D-IMAGES"),
    ],
)
def test_damaged_images(tmp_path, field, code):
    found = table(tmp_path, row(1), row(2, image=field), row(3, image="2"))
    for number in (1, 2):  # the row at fault is named, also where another one refers to it
        with pytest.raises(Refusal) as refused:
            found.images(number)
        refusal = refused.value
        assert (refusal.code, refusal.record, refusal.key) == (code, 1, "image")
        assert str(found.path) in refusal.line()


@pytest.mark.parametrize(
    "name, code, key",
    [("missing.png", "I-MISSING", "image"), ("../X.tsv", "I-PATH", "image"), ("/etc/hosts", "I-PATH", "image"),
     ("", "D-IMAGES", "image_path"), ("[1, 2]", "D-IMAGES", "image_path"), ("[", "D-IMAGES", "image_path")],
)  # fmt: skip
def test_damaged_image_paths(tmp_path, name, code, key):
    found = table(tmp_path, row(1, image_path=name), columns=["index", "image_path", "question"])
    with pytest.raises(Refusal) as refused:
        found.images(0)
    assert (refused.value.code, refused.value.record, refused.value.key) == (code, 0, key)


def test_a_file_that_changes_under_the_reader(tmp_path):
    found = table(tmp_path, row(1), row(2))
    written(tmp_path, tsv(COLUMNS, [row(3), row(4)]))
    with pytest.raises(Refusal) as refused:
        found.images(1)
    assert (refused.value.code, refused.value.record) == ("I-CHANGED", 1)


def test_lines_and_fields_have_a_limit(tmp_path, monkeypatch):
    path = written(tmp_path, HEADER + f"1\t{'A' * 5000}\twhat?\n")
    monkeypatch.setattr(reader, "MAX_FIELD", 2000)
    with pytest.raises(Refusal, match="the line is too long"):
        Table(path)
    monkeypatch.setattr(reader, "MAX_FIELD", 4000)
    before = csv.field_size_limit(0)
    try:
        with pytest.raises(Refusal, match="field larger than field limit"):
            Table(path)
    finally:
        csv.field_size_limit(before)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=5))
def test_read_as_pandas_reads(tmp_path_factory, fields):
    pandas = pytest.importorskip("pandas")
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["index", "image", "question", "A", "hint"])
    writer.writerows([[n, image(n), *values] for n, values in enumerate(fields)])
    path = written(tmp_path_factory.mktemp("t"), file.getvalue())
    expected = pandas.read_csv(path, sep="\t", dtype=str, keep_default_na=False).drop(columns="image")
    assert Table(path).rows == [{k: v for k, v in r.items() if v} for r in expected.to_dict("records")]


def test_what_pandas_takes_for_missing():
    parsers = pytest.importorskip("pandas._libs.parsers")
    assert parsers.STR_NA_VALUES - {""} == PANDAS_MISSING


def test_any_damage_is_a_refusal(tmp_path):
    """Bytes changed, cut out and put in at random: the file is read, or refused; nothing else is raised."""
    random_ = random.Random(3)
    whole = tsv(
        COLUMNS, [row(1), row(2, image="1"), row(3, question='"a"\n\tb'), row(4, image=str([image(1)] * 2))]
    ).encode()
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(random_.choice((1, 1, 3))):
            place, length = random_.randrange(len(data)), random_.choice((0, 1, 1, 5, 200))
            data[place : place + length] = random_.choice(
                (b"", b"\t", b"\n", b'"', b"\0", b"\xff", b"[", b"1", b"A" * 70)
            )
        path = written(tmp_path, bytes(data))
        try:
            found = Table(path)
            for number in range(len(found)):
                found.images(number)
        except Refusal as refusal:
            assert str(path) in refusal.line()
            refused += 1
    assert refused > 100


MEASURE = """
import sys
from llava_moslora.evaluation.tsv import Table

def memory(name):  # in GiB: VmRSS is what the process has now, VmHWM the most since it was last reset
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 2**20

open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
table = Table(sys.argv[1])
read = memory("VmHWM") - before
for number in range(0, len(table), 5):
    table.images(number)
print(len(table), before, read, memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_of_a_file_of_300_megabytes(tmp_path):
    """At most 0.3 GB above the imports, to read the file and to decode a fifth of its images."""
    random_, path = random.Random(0), tmp_path / "big.tsv"
    with open(path, "w", encoding="utf-8") as file:
        file.write("\t".join([*COLUMNS, "hint", "category"]) + "\n")
        number = 0
        while file.tell() < 300e6:
            noise = Image.frombytes("RGB", (224, 224), random_.randbytes(224 * 224 * 3))
            data = io.BytesIO()
            noise.save(data, "PNG")
            field = base64.b64encode(data.getvalue()).decode()
            for turn in range(4):
                values = row(number + turn * 1_000_000, image=str(number) if turn else field)
                file.write("\t".join([*values.values(), "a hint " * 20, "attribute_reasoning"]) + "\n")
            number += 1
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True, capture_output=True, text=True)
    rows, imports, indexed, used = map(float, run.stdout.split())
    print(f"{rows:.0f} rows: imports {imports:.3f} GiB, reading {indexed:.3f} more, with images {used:.3f} more")
    assert rows == 4 * number and used < 0.3
