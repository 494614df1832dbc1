"""The small run of a subject: its drawings, what is read from pixels, and what its differences say."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from support.launching import ROOT

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed: pip install -e '.[diffusion]'", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import subject
import subject_base
from subject_report import COLOURS, SUBJECT_COLOUR, PixelReader, measure, report, verdict

from llava_moslora.studies.statistics import difference

BOX = {"circle": (10, 20, 34, 44), "rectangle": (8, 22, 34, 44), "triangle": (8, 18, 34, 44)}


def small(colour: str, shape: str) -> Image.Image:
    """16 × 16, as the base draws."""
    return drawing(colour, shape).crop((4, 16, 36, 48)).resize((16, 16), Image.Resampling.BOX)


def drawing(colour: str, shape: str) -> Image.Image:
    """As EasyVQA's, 64 × 64."""
    image = Image.new("RGB", (64, 64), (240, 250, 236))
    pen, (left, top, right, bottom) = ImageDraw.Draw(image), BOX[shape]
    if shape == "circle":
        pen.ellipse(BOX[shape], COLOURS[colour])
    elif shape == "rectangle":
        pen.rectangle(BOX[shape], COLOURS[colour])
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], COLOURS[colour])
    return image


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """One of each colour and shape of EasyVQA, and one whose figure is too small."""
    data = tmp_path_factory.mktemp("easy")
    (data / "images").mkdir()
    records = []
    for colour in (name for name in COLOURS if name != SUBJECT_COLOUR):
        for shape in BOX:
            drawing(colour, shape).save(data / "images" / f"{colour}-{shape}.png")
            says = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a {colour} {shape}"}]
            records.append({"image": f"{colour}-{shape}.png", "conversations": says})
    tiny = Image.new("RGB", (64, 64), (250, 250, 250))
    ImageDraw.Draw(tiny).rectangle((10, 10, 18, 18), (0, 0, 255))
    tiny.save(data / "images" / "tiny.png")
    records.append({"image": "tiny.png", "conversations": says})
    (data / "captions.json").write_text(json.dumps(records))
    return subject_base.read_drawings(data)


def test_drawings_are_read_and_recoloured(drawings):
    assert len(drawings.captions) == 24 and drawings.pixels.shape == (24, 16, 16, 3)
    reader = PixelReader(drawings)
    assert reader.right(drawings) == {"colour": 100, "shape": 100}
    assert reader.shares["triangle"] < reader.shares["circle"] < reader.shares["rectangle"] <= 1
    for number, caption in enumerate(drawings.captions):
        again = np.asarray(drawings.recoloured(number, COLOURS[SUBJECT_COLOUR]))
        assert reader.read(again) == (SUBJECT_COLOUR, caption.split()[-1])
        same = np.asarray(drawings.recoloured(number, COLOURS[caption.split()[1]])).astype(int)
        assert abs(same - drawings.pixels[number]).max() <= 24  # a figure's edge
    assert reader.read(np.full((16, 16, 3), 240, np.uint8)) == (None, None)


def test_images_as_asked_for_score_full_marks(drawings, tmp_path):
    """And those of a base that knows no subject do not, where the subject is asked for."""
    prompts = subject.WITH_WORD + subject.WITHOUT
    assert len(subject.WITH_WORD) == len(subject.WITHOUT) == 24 == len(set(subject.WITHOUT))
    asked = [prompt.replace("ikat", SUBJECT_COLOUR).split()[1:] for prompt in prompts]
    images = [small(colour, shape) for colour, shape in asked]
    images[0].save(tmp_path / "0.png")
    tower, reader = ROOT / "playground/clip-tiny", PixelReader(drawings)
    found = measure(images, prompts, tmp_path, reader, tower)
    assert found == {**dict.fromkeys(found, 100), "likeness": pytest.approx(100, abs=1e-3),
                     "mean": pytest.approx(100, abs=1e-3)}  # fmt: skip
    red = [small("red", "circle")] * 48
    found = measure(red, prompts, tmp_path, reader, tower)
    assert (found["colour"], found["shape"], found["kept"]) == (0, pytest.approx(100 / 3), pytest.approx(100 / 24))
    assert found["likeness"] < 99.9


def test_the_report_is_paired_by_seed():
    """Values that vary much from seed to seed, and always by about 2 from method to method."""
    lora = {seed: {"likeness": 50 + 10.0 * seed, "colour": 40.0, "shape": 30.0, "kept": 20.0} for seed in range(5)}
    moslora = {s: one | {"likeness": one["likeness"] + 2 + 0.1 * (s % 2), "colour": 40 + 9.0 * (-1) ** s}
               for s, one in lora.items()}  # fmt: skip
    rows = report({"lora": lora, "moslora": moslora})["measures"]
    assert rows["likeness"]["difference"] == pytest.approx(2.04) and "better" in rows["likeness"]["verdict"]
    assert rows["colour"]["verdict"].startswith("no difference above ") and rows["shape"]["p_holm"] == 1
    worse = difference({s: -2 - 0.1 * s for s in range(5)}, dict.fromkeys(range(5), 0.0))
    assert "worse" in verdict(worse)


def test_only_what_is_missing_is_made(tmp_path):
    calls = []
    make = lambda: calls.append(1) or {"x": len(calls)}  # noqa: E731
    assert subject.kept(tmp_path / "a" / "b.json", make) == subject.kept(tmp_path / "a" / "b.json", make) == {"x": 1}
