"""The radar: points where arithmetic by hand puts them, every label readable, the same questions for every curve."""

from dataclasses import replace
from math import cos, pi, sin

import pytest
from PIL import Image, ImageChops, ImageDraw

from llava_moslora.errors import Refusal
from llava_moslora.evaluation.benchmarks import ABILITIES
from llava_moslora.evaluation.radar import (
    CENTRE,
    COLOURS,
    PAPER,
    RADIUS,
    WIDTH,
    draw,
    lacking,
    radar_of,
    rings_of,
    write_radar,
)
from llava_moslora.evaluation.results import Result
from llava_moslora.evaluation.scoring import Score

COUNTS = dict(zip(ABILITIES, (264, 1555, 203, 449, 144, 169), strict=True))
A = [50, 55, 60, 65, 70, 75, 80, 85, 90, 72.5, 51.25, 88]
B = [90, 85, 80, 75, 70, 65, 60, 55, 50, 60, 70, 80]


def model(values, counts=COUNTS, rules="rules", **header):
    """Results of which the twelve abilities have these values, Chinese first."""
    made = {}
    for name, six in (("mmbench_cn", values[:6]), ("mmbench_en", values[6:])):
        by = {"l2-category": dict(zip(ABILITIES, map(float, six), strict=True))}
        score = Score(70.0, rules, (), (), by, counts={"l2-category": counts})
        made[name] = Result({"benchmark": name, "data": "d", "limit": None} | header, score)
    return made


def colour(text):
    return tuple(bytes.fromhex(text[1:]))


def at(image, axis, share):
    """The colour where a point belongs: clockwise from the top, 30 degrees apart, the first at 15 degrees."""
    angle = pi * (15 + 30 * axis) / 180
    return image.getpixel(
        (round(CENTRE[0] + share * RADIUS * sin(angle)), round(CENTRE[1] - share * RADIUS * cos(angle)))
    )


def test_every_point_is_where_its_value_belongs():
    """Values of 50 to 90 give rings from 40 to 90 in steps of 10: 65 is at half the radius."""
    image = draw(radar_of([("a", model(A)), ("b", model(B))]))
    assert rings_of([*A, *B]) == [40, 50, 60, 70, 80, 90] and image.width == WIDTH
    for axis, (a, b) in enumerate(zip(A, B, strict=True)):
        assert at(image, axis, (b - 40) / 50) == colour(COLOURS[1]), axis
        if abs(a - b) > 3:  # else the second curve hides the first
            assert at(image, axis, (a - 40) / 50) == colour(COLOURS[0]), axis
    assert image.getpixel((CENTRE[0] + RADIUS - 5, 120)) == colour(PAPER)


def test_edges_are_smooth():
    """Between ink and paper there are shades: more of them than a drawing without anti-aliasing has colours."""
    assert len(draw(radar_of([("a", model(A))])).getcolors(1 << 20)) > 100


def test_normalised_as_the_papers_figure():
    """Every axis is divided by the better model: 50 of 90 is 55.6 %, and the better one is on the outer ring."""
    radar = radar_of([("a", model(A)), ("b", model(B))], normalise=True)
    for axis, (a, b) in enumerate(zip(A, B, strict=True)):
        assert radar.curves[0][1][axis] == pytest.approx(100 * a / max(a, b))
        assert radar.curves[1][1][axis] == pytest.approx(100 * b / max(a, b))
    image = draw(radar)
    for axis in range(12):
        assert at(image, axis, 1) == colour(COLOURS[1 if B[axis] >= A[axis] else 0])


def test_labels_name_language_ability_and_number_of_questions(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, xy, text, *_, **__: drawn.append((xy[0] / 3, xy[1] / 3, text))
    )
    draw(radar_of([("results/lora", model(A)), ("m" * 80, model(B))]))
    texts = [text for _, _, text in drawn]
    for title in ABILITIES.values():
        first, *rest = title.replace(" (", "\n(").split("\n")
        assert f"CN {first}" in texts and f"EN {first}" in texts and all(texts.count(line) >= 2 for line in rest)
    assert texts.count("1,555 questions") == texts.count("264 questions") == 2
    assert "results/lora" in texts and "…" + "m" * 59 in texts and "The centre is 40 %, not 0." in texts
    assert [text for text in texts if text.isdecimal()] == ["50", "60", "70", "80", "90"]
    assert all(x > CENTRE[0] for x, _, text in drawn if text.startswith("CN"))
    assert all(x < CENTRE[0] for x, _, text in drawn if text.startswith("EN"))


@pytest.mark.parametrize("models", [1, 2, 7])
def test_no_text_is_cut_or_covers_another(monkeypatch, models):
    """The boxes of all texts lie in the picture and apart from each other."""
    boxes = []
    original = ImageDraw.ImageDraw.text

    def text(self, xy, shown, fill, font, anchor, **how):
        boxes.append((self.textbbox(xy, shown, font, anchor), shown))
        original(self, xy, shown, fill, font, anchor, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    image = draw(radar_of([(f"{'long name ' * 5}{n}", model(A)) for n in range(models)]))
    for number, ((left, top, right, bottom), shown) in enumerate(boxes):
        assert 0 <= left < right <= 3 * image.width and 0 <= top < bottom <= 3 * image.height, shown
        for (l2, t2, r2, b2), other in boxes[:number]:
            assert right <= l2 or r2 <= left or bottom <= t2 or b2 <= top, (shown, other)
    assert len(boxes) >= 12 * 2 + models


def test_the_file_holds_the_values_as_text(tmp_path):
    radar = radar_of([("a", model(A)), ("b", model(B))])
    write_radar(tmp_path / "radar.png", radar)
    with Image.open(tmp_path / "radar.png") as image:
        image.load()
        lines = image.text["Description"].splitlines()
        assert not ImageChops.difference(image.convert("RGB"), draw(radar)).getbbox()
    assert len(lines) == 12 and lines[0] == "CN Attribute Reasoning, 264 questions: a 50.0, b 90.0"
    assert lines[8].startswith("EN Fine-grained Perception (Cross-instance), 203 questions: a 90.0")
    assert [file.name for file in tmp_path.iterdir()] == ["radar.png"]


@pytest.mark.parametrize("values, rings", [
    ([0], [0, 1]), ([100], [99, 100]), ([0, 100], [0, 20, 40, 60, 80, 100]), ([73.5], [73, 74]),
    ([70, 74.2], [68, 70, 72, 74, 76]), ([3, 55], [0, 20, 40, 60]), ([82, 100], [75, 80, 85, 90, 95, 100]),
])  # fmt: skip
def test_rings(values, rings):
    assert rings_of(values) == rings


def test_what_is_missing_is_said_in_words():
    whole = model(A)
    assert lacking(whole) == ""
    assert lacking({"mmbench_cn": whole["mmbench_cn"]}) == "mmbench_en was not evaluated"
    without = model(A, {ability: n for ability, n in COUNTS.items() if ability != "logic_reasoning"})
    assert lacking(without) == "mmbench_cn has no question of logic_reasoning"
    earlier = {name: replace(r, score=replace(r.score, counts={})) for name, r in whole.items()}
    assert lacking(earlier).startswith("mmbench_cn was scored before questions were counted by ability")
    neither = {name: replace(r, score=replace(r.score, counts={}, by={})) for name, r in whole.items()}
    assert lacking(neither).startswith("mmbench_cn has no question of attribute_reasoning, coarse_perception")


@pytest.mark.parametrize("models, code, message", [
    ([("a", model(A)), ("b", {})], "C-RADAR", "b:--radar: no radar chart can be drawn; found mmbench_cn was not"),
    ([("a", model(A))] * 8, "C-RADAR", "too many models to tell apart; found 8; expected at most 7"),
    ([("a", model(A)), ("b", model(B, data="e"))], "C-COMPARE", r"mmbench_cn\.data: not asked in the same way"),
    ([("a", model(A)), ("b", model(B, rules="x"))], "C-COMPARE", "scored by different rules; found rules and x"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused(models, code, message):
    with pytest.raises(Refusal, match=message) as refused:
        radar_of(models)
    assert refused.value.code == code


def test_nothing_to_normalise_by():
    with pytest.raises(
        Refusal, match=r"C-RADAR\] --normalise: nothing to normalise by.*found CN Coarse Perception, 1,555"
    ):
        radar_of([("a", model([1, 0, *A[2:]])), ("b", model([1, 0, *B[2:]]))], normalise=True)
