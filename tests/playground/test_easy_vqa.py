"""The demo's training questions as multiple choice."""

import copy
import random
import sys

from support.launching import ROOT

sys.path.insert(0, str(ROOT / "playground"))

from easy_vqa import LETTERS, PROMPT, VALUES, options_of, record, with_choices

TURNS = [("what color is the circle?", "teal"), ("is there a circle?", "yes"), ("what shape is present?", "circle")]


def test_every_other_question_that_asks_what_is_answered_by_a_letter():
    records = [record(str(n), f"train/{n}.png", TURNS) for n in range(20)]
    plain = copy.deepcopy(records)
    letters = []
    for item, before in zip(with_choices(records), plain, strict=True):
        turns, values = ([t["value"] for t in x["conversations"]] for x in (item, before))
        assert turns[2:4] == ["is there a circle?", "yes"]
        assert turns[4:] == values[4:]  # the second one that asks what
        question, *options, prompt = turns[0].removeprefix("<image>\n").split("\n")
        assert turns[0].startswith("<image>\n") and (question, prompt) == (TURNS[0][0], PROMPT)
        shown = dict(option.split(". ") for option in options)
        assert list(shown) == list(LETTERS) and shown[turns[1]] == "teal" and set(shown.values()) < set(VALUES["color"])
        letters.append(turns[1])
    assert set(letters) == set(LETTERS)


def test_a_shape_has_as_many_options_as_there_are_shapes():
    found = options_of("what shape is present?", "circle", random.Random(0))
    assert sorted(found) == sorted(VALUES["shape"])
