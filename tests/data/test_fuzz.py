"""Thousands of damaged data files and images: a result or a typed refusal, in less than a second each."""

import io
import json
import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_moslora.data.formats import Record, read_records
from llava_moslora.data.images import check_image, load_image
from llava_moslora.errors import Refusal

pytestmark = pytest.mark.faults
FUZZ = settings(deadline=1000, suppress_health_check=list(HealthCheck), database=None, derandomize=True)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """No case may take 500 MB: this process's highest mark, which one case is enough to raise, stays below that."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("<image>\nx")
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=4))
turns = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system"]) | values, "value": st.text() | values}
)
part = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "video"]) | values},
    optional={
        "text": st.text() | values,
        "image": values,
        "image_url": values | st.fixed_dictionaries({"url": values}),
    },
)
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | values,
        "content": st.text() | st.lists(part | values, max_size=3) | values,
    },
    optional={"train": values, "loss": values, "tool_calls": values},
)
pair = st.fixed_dictionaries({"user": st.text() | values, "assistant": st.text() | values})
optional = dict.fromkeys(("id", "image", "images", "system", "tools", "history"), values)


def with_keys(content, *keys):
    return st.fixed_dictionaries(dict.fromkeys(keys, content | values), optional=optional)


shaped = st.one_of(
    with_keys(st.lists(turns | message | values, max_size=4), "conversations"),
    with_keys(st.lists(message | values, max_size=4), "messages"),
    with_keys(st.text() | st.lists(message, max_size=3), "prompt", "completion"),
    with_keys(st.lists(pair | values, max_size=3), "texts"),
    with_keys(st.text(), "instruction", "input", "output"),
)
GOOD = {
    "id": "é",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\n👩‍👩‍👧"}, {"from": "gpt", "value": "x"}],
}


@st.composite
def damaged(draw, whole: bytes, cuts: int = 4) -> bytes:
    """``whole`` with some bytes changed, taken out, doubled, or its end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, cuts))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["change", "remove", "repeat", "cut", "insert"]))
        length = draw(st.integers(1, 20))
        if kind == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "remove":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 50))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=length))
        else:
            del data[at:]
    return bytes(data)


def read_all(path) -> None:
    try:
        for record in read_records(path):
            assert isinstance(record, Record)
            assert record.turns[-1].role == "gpt"
    except Refusal as refusal:
        assert refusal.exit_status == 2
        assert str(refusal).isprintable()
        assert len(str(refusal)) < 2000


@given(records=st.lists(shaped | values, max_size=3), lines=st.booleans(), ascii=st.booleans())
@settings(FUZZ, max_examples=1500)
def test_records_of_any_shape(tmp_path, records, lines, ascii):
    path = tmp_path / "data.json"
    text = (
        "\n".join(json.dumps(r, ensure_ascii=ascii) for r in records)
        if lines
        else json.dumps(records, ensure_ascii=ascii)
    )
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    read_all(path)


@given(content=damaged(json.dumps([GOOD, GOOD]).encode()) | damaged(json.dumps([GOOD], ensure_ascii=False).encode()))
@settings(FUZZ, max_examples=1500)
def test_damaged_data_files(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    read_all(path)


def images() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8))
    frames = [noise, noise.rotate(180)]
    made = {}
    for kind, image, options in [
        ("JPEG", noise, {}),
        ("JPEG", noise.convert("CMYK"), {"progressive": True}),
        ("PNG", noise, {}),
        ("PNG", noise.convert("P"), {"transparency": 0}),
        ("PNG", noise, {"save_all": True, "append_images": frames}),
        ("WEBP", noise, {}),
        ("WEBP", noise, {"save_all": True, "append_images": frames}),
        ("GIF", noise, {"save_all": True, "append_images": frames}),
        ("BMP", noise.convert("P"), {}),
        ("TIFF", noise, {"compression": "tiff_lzw"}),
        ("TIFF", Image.fromarray(np.zeros((5, 5), np.uint16)), {}),
    ]:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        made[f"{kind} {len(made)}"] = buffer.getvalue()
    return made


IMAGES = images()


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's about damaged TIFF tags
def test_damaged_images(tmp_path, kind):
    @given(content=damaged(IMAGES[kind]))
    @settings(FUZZ, max_examples=250)
    def load(content):
        (tmp_path / "x").write_bytes(content)
        try:
            width, height = check_image("x", tmp_path)
            image = load_image("x", tmp_path)
            assert image.mode == "RGB"
            assert sorted(image.size) == sorted((width, height))
        except Refusal as refusal:
            assert refusal.code.startswith("I-")
            assert str(refusal).isprintable()

    load()


@given(name=st.text(max_size=60) | st.from_regex(r"(\.\./|/|\\|[a-z]:|x)*[\x00-\xff]{0,5}", fullmatch=True))
@settings(FUZZ, max_examples=1000)
def test_names_of_any_kind(tmp_path, name):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(Refusal, match="I-") as refusal:
        load_image(name, tmp_path)
    assert str(refusal.value).isprintable()
