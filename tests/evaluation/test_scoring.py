"""Readings, prompts and scores worked out by hand.

Those of ``rules-2024`` and ``prompts-2024`` follow from VLMEvalKit at ab638e4a36b0a2cf18b03f656e6b94203ed9e369 of
2024-06-18, the week in which the MoSLoRA paper appeared: a letter counts anywhere in the answer, an option's text in an
answer of any length, a full stop after a digit is removed, and TextVQA's instruction ends in a newline.
"""

import pytest

from llava_moslora.evaluation.prompts import LETTER, LETTER_CHINESE, prompt
from llava_moslora.evaluation.reading import CONTRACTIONS, RULES, normalise, read_option, read_yes_no, vqa_accuracy
from llava_moslora.evaluation.scoring import PERCEPTION, score, score_of, unit_of

NOW, OLD = RULES["rules"], RULES["rules-2024"]
TWO = {"A": "red", "B": "blue"}
FOUR = TWO | {"C": "red car", "D": "None"}


@pytest.mark.parametrize(
    "answer, options, now, old",
    [
        ("B", FOUR, "B letter", "B letter"),
        ("(B).", FOUR, "B letter", "B letter"),
        ("b", FOUR, "unread", "unread"),
        ("A or B", FOUR, "unread", "unread"),
        ("The answer is **B**", FOUR, "B letter", "B letter"),
        ("The letter B", FOUR, "B letter", "B letter"),
        ("B is it, I said", FOUR, "unread", "B letter"),  # five words from the end
        ("B is it, so", FOUR, "B letter", "B letter"),  # four
        ("B it is, and nothing else but B", TWO, "unread", "B letter"),  # the first occurrence counts
        ("E", FOUR, "unread", "unread"),
        ("E", FOUR | {"E": "x"}, "E letter", "E letter"),
        ("Blue", FOUR, "B text", "B text"),
        ("a red car", FOUR, "unread", "unread"),  # `red` is in it too
        ("none of them", FOUR, "D text", "D text"),
        ("blue " * 3, TWO, "unread", "B text"),  # 15 characters, twice `red` and `blue` are 14
        ("It is blue  !!", TWO, "B text", "B text"),  # 14
        ("12", {"A": "1", "B": "7"}, "A text", "A text"),  # a trap of the kit
        ("这是B", TWO, "unread", "unread"),
        ("这是 B 。", TWO, "B letter", "B letter"),
        ("Z", FOUR, "Z letter", "Z letter"),
        ("Z or A", FOUR, "A letter", "A letter"),
        ("Cannot determine the answer, B", FOUR, "Z refusal", "Z refusal"),
        ("Failed to obtain answer via API. B", FOUR, "unread", "unread"),
        ("Failed to obtain answer via API. blue", FOUR, "unread", "B text"),  # 37 characters, 2 × 18 at most
        ("", FOUR, "unread", "unread"),
        ("None", FOUR, "D text", "D text"),
        ("B" * 40_000, FOUR, "unread", "unread"),
    ],
)
def test_options(answer, options, now, old):
    for rules, expected in ((NOW, now), (OLD, old)):
        reading = read_option(answer, options, rules)
        assert f"{reading.value} {reading.rule}".removeprefix("None ") == expected, rules.name


@pytest.mark.parametrize(
    "answer, expected",
    [("Yes", "Yes"), ("no.", "No"), ("Yes, it is.", "Yes"), ("yes or no", None), ("nope", None), ("", None),
     ("No, no, no", "No"), ("yes/no", None), ("Yes-", "Yes"), ("It is. Yes", "Yes"), ("YES!", "Yes"), ("yes.no", None)],
)  # fmt: skip
def test_yes_and_no(answer, expected):
    assert read_yes_no(answer, NOW).value == read_yes_no(answer, OLD).value == expected


@pytest.mark.parametrize(
    "text, now, old",
    [
        ("The Dog.", "dog", "dog"), ("three", "3", "3"), ("None", "0", "0"), ("dont", "don't", "don't"),
        ("couldnt've", "couldn't've", "couldn't've"), ("a b", "b", "b"), ("A", "", ""), ("U.S.A.", "usa", "usa"),
        ("3.", "3.", "3"), ("3.5", "3.5", "3.5"), ("1,000", "1000", "1000"), ("1,0 a-b", "10 ab", "10 ab"),
        ("a-b", "b", "b"), ("x-y", "x y", "x y"), ("x -y", "x y", "x y"), ("x- y-z", "x yz", "x yz"),
        ("new\nline\t", "new line", "new line"), ("x" + "." * 40, "x" + "." * 8, "x" + "." * 8), ("#1", "#1", "#1"),
    ],
)  # fmt: skip
def test_short_answers_are_normalised(text, now, old):
    assert (normalise(text, NOW), normalise(text, OLD)) == (now, old)


def test_vqa_accuracy():
    ten = ["red"] * 2 + ["blue"] * 3 + ["A red"] + ["green"] * 4
    assert vqa_accuracy("green", ten, NOW) == 1.0  # four times 3 others, six times 4
    assert vqa_accuracy("blue", ten, NOW) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("Red.", ten, NOW) == pytest.approx((3 * 2 / 3 + 7) / 10)  # with the article
    assert vqa_accuracy("x", ten, NOW) == 0.0
    assert vqa_accuracy("x", ["x"], NOW) == 0.0  # nobody else said it
    assert (vqa_accuracy("5.", ["5"] * 10, NOW), vqa_accuracy("5.", ["5"] * 10, OLD)) == (0.0, 1.0)
    assert len(CONTRACTIONS) == 114  # the kit's 120, without six that lower case never meets or that change nothing


ROW = {"index": "1", "question": "Which?", "A": "red", "B": "blue", "D": "None", "answer": "A"}


def test_prompts():
    assert prompt(ROW, "circular", "prompts-2024") == f"Which?\nA. red\nB. blue\nD. None\n{LETTER}"
    hinted = ROW | {"hint": "Look."}
    assert prompt(hinted, "multiple-choice", "prompts") == f"Look.\nWhich?\nA. red\nB. blue\nD. None\n{LETTER}"
    for chinese in ({"hint": "看图"}, {"question": "哪个?"}, {"B": "蓝"}):  # one character anywhere
        assert prompt(ROW | chinese, "circular", "prompts").endswith(f"D. None\n{LETTER_CHINESE}")
    assert prompt(ROW | {"A": "ａ，。"}, "circular", "prompts").endswith(LETTER)  # full-width forms are no characters
    short = "Which?\nAnswer the question using a single word or phrase."
    assert prompt(ROW, "vqa", "prompts") == short and prompt(ROW, "vqa", "prompts-2024") == short + "\n"
    for kind in ("yes-no", "mathvista", "mmvet"):
        assert prompt(hinted | {"question": "<image>Is it?"}, kind, "prompts-2024") == "Is it?"


def test_circular_and_vanilla():
    rows = [
        {"index": str(n + turn * 1_000_000), "A": "x", "B": "y", "answer": "AB"[turn], "l2-category": c, "split": s}
        for n, c, s in ((0, "p", "dev"), (1, "p", "test"), (2, "q", "test"))
        for turn in (0, 1)
    ]
    answers = {"0": "A", "1000000": "B", "1": "A", "1000001": "A", "2": "A", "1000002": "I do not know what"}
    circular = score("circular", rows, answers, NOW)
    assert circular.value == pytest.approx(100 / 3) and [unit.value for unit in circular.units] == [100, 0, 0]
    assert circular.by == {"split": {"dev": 100, "test": 0}, "l2-category": {"p": 50, "q": 0}}
    assert circular.counts == {"split": {"dev": 1, "test": 2}, "l2-category": {"p": 2, "q": 1}}
    assert circular.unread == pytest.approx(1 / 6) and circular.read_by == {"letter": 5, "unread": 1}
    assert circular.rules == "rules" and [o.read for o in circular.outcomes] == ["A", "B", "A", "A", "A", None]
    vanilla = score("multiple-choice", rows, answers, NOW)
    assert vanilla.value == pytest.approx(400 / 6) and len(vanilla.units) == 6
    assert unit_of(rows[3], "circular") == "1" and unit_of(rows[3], "multiple-choice") == "1000001"


def test_mme():
    rows = [
        {"index": f"{task}{image}{answer}", "category": task, "image_path": image, "answer": answer}
        for task, image in (("count", "a"), ("count", "b"), ("OCR", "a"), ("code_reasoning", "c"))
        for answer in ("Yes", "No")
    ]
    answers = dict.fromkeys((row["index"] for row in rows), "Yes") | {"countaNo": "No", "code_reasoningcYes": "maybe"}
    result = score("yes-no", rows, answers, NOW)
    # count: 3 of 4 questions, 1 of 2 images; OCR: 1 of 2, none; code_reasoning: nothing
    assert result.by["subtask"] == {"count": 125, "OCR": 50, "code_reasoning": 0}
    assert result.by["total"] == {"perception": 175, "cognition": 0}
    assert result.value == pytest.approx(175 / 600 * 100) == pytest.approx(score_of(result.units))
    assert result.note.startswith("3 of 14 subtasks: without artwork") and result.unread == 1 / 8
    full = [
        r | {"category": t, "index": f"{t}{r['index']}"} for t in (*PERCEPTION, "text_translation") for r in rows[:2]
    ]
    assert "commonsense_reasoning" in score("yes-no", full, {r["index"]: r["answer"] for r in full}, NOW).note


def mathvista(**fields):
    return {"index": "1", "question_type": "free_form", "answer_type": "integer", "answer": "3", "task": "t"} | fields


@pytest.mark.parametrize(
    "row, answer, read, right",
    [
        (mathvista(), "3", "3", 100), (mathvista(), " 3\n", "3", 100), (mathvista(), "3.0", None, 0),
        (mathvista(), "4", None, 0), (mathvista(), "It is 3", None, 0), (mathvista(answer="3.0"), "3", None, 0),
        (mathvista(answer="0"), "0", None, 0),  # right, and still left to the judge
        (mathvista(answer="3.", answer_type="float"), "3", "3.0", 100),
        (mathvista(answer="[1, 2]", answer_type="list"), "[1, 2]", None, 0),
        (mathvista(question_type="multi_choice", choices="['3', '4']", answer_option="B"), "B", "B", 100),
        (mathvista(question_type="multi_choice", choices="['3', '4']", answer_option="B"), "(A)", "A", 0),
        (mathvista(question_type="multi_choice", choices="['3', '4']", answer_option="B"), "4", "B", 100),
    ],
)  # fmt: skip
def test_mathvista_by_rules(row, answer, read, right):
    for rules in RULES.values():
        result = score("mathvista", [row], {"1": answer}, rules)
        assert (result.outcomes[0].read, result.value) == (read, right)
        assert result.note == ("" if read else "lower bound by rules")


def test_judged_sets():
    rows = [mathvista(skills="['a', 'b']"), mathvista(index="2", answer="0", skills="b")]
    answers = {"1": "It is 3", "2": "It is 0"}
    alone = score("mathvista", rows, answers, NOW)
    assert (alone.value, alone.note, alone.unread) == (0, "lower bound by rules", 1)
    judged = score("mathvista", rows, answers, NOW, {"1": "3", "2": "0"})
    assert (judged.value, judged.note, judged.read_by) == (100, "", {"judge": 2})
    assert judged.by["skill"] == {"a": 100, "b": 100} and judged.by["task"] == {"t": 100}
    rows = [{"index": "1", "category": "rec,ocr"}, {"index": "2", "category": "rec"}]
    open_ = score("mmvet", rows, answers, NOW)
    assert (open_.value, open_.note, open_.units) == (None, "needs a judge", ())
    assert score("mmvet", rows, answers, NOW, {"1": "0.5"}).note == "needs a judge for 1 of 2 answers"
    graded = score("mmvet", rows, answers, NOW, {"1": "0.5", "2": "as good as 1"})
    assert graded.value == 25 and graded.read_by == {"judge": 1, "unread": 1}
    assert graded.by["capability"] == {"rec": pytest.approx(50 / 3), "ocr": 50}
