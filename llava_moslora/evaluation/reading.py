"""Parses free-text answers by VLMEvalKit's rules: an option's letter, yes or no, a number, a short text.

Two sets of rules, because the same answer can score differently: those of the week in which the MoSLoRA paper appeared,
and those of the newest kit on PyPI. The name of the set goes into every result. All functions are pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_moslora.evaluation.rows import literal_list


@dataclass(frozen=True)
class Rules:
    """What differs between versions of VLMEvalKit.

    Attributes:
        letter_within: the option's letter must stand among so many last words; None: anywhere.
        longest_text: an answer longer than this many times all options together is not searched for an option's text.
        full_stop: what is taken out of short answers as a full stop; only in 2024 is ``3.`` the same answer as ``3``.
    """

    name: str
    source: str
    letter_within: int | None
    longest_text: float | None
    full_stop: re.Pattern


RULES = {
    rules.name: rules
    for rules in (
        # Changed on the way: full stops by 928a95b0 (2025-05-13), letters and texts by c3371551 (2025-08-04).
        Rules("rules", "ms-vlmeval 0.0.20 (2026-05)", 4, 2.0, re.compile(r"(?<!\d)\.(?!\d)")),
        Rules("rules-2024", "VLMEvalKit ab638e4a (2024-06-18)", None, None, re.compile(r"\.(?!\d)")),
    )
}

REFUSED = "Z"  # the letter of a refused answer; never right
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_ANSWER = "Failed to obtain answer via API"
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The words of VQA's evaluation; every spelling with one apostrophe less becomes the word.
_WORDS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _WORDS for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # as VQA's evaluation has it
MAX_STOPS = 32  # so many full stops are taken out: the kit passes a flag of this value as the count


@dataclass(frozen=True)
class Reading:
    """The parsed value, and the rule that parsed it: letter, text, refusal, word, number; ``unread`` with None."""

    value: str | None
    rule: str


UNREAD = Reading(None, "unread")


def read_option(answer: str, options: Mapping[str, str], rules: Rules) -> Reading:
    """The letter that ``answer`` chooses out of ``options`` (letter → text), :data:`REFUSED`, or none.

    First a letter of an option that stands alone as a word, then the text of exactly one option inside the answer; so
    option ``1`` is found in ``12``. Source: ``can_infer`` in the kit's ``vlmeval/utils/matching_util.py``.
    """
    letter = _read_letter(answer, options, rules)
    return letter if letter.value is not None else _read_text(answer, options, rules)


def _read_letter(answer: str, options: Mapping[str, str], rules: Rules) -> Reading:
    if NO_ANSWER in answer:
        return UNREAD
    if any(refusal in answer for refusal in REFUSALS):
        return Reading(REFUSED, "refusal")
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        last = len(words) if rules.letter_within is None else rules.letter_within
        if words.index(letters[0]) >= len(words) - last:
            return Reading(letters[0], "letter")
    if not letters and REFUSED in words:
        return Reading(REFUSED, "letter")
    return UNREAD


def _read_text(answer: str, options: Mapping[str, str], rules: Rules) -> Reading:
    answer = answer.lower()
    if rules.longest_text is not None and len(answer) > rules.longest_text * sum(map(len, options.values())):
        return UNREAD
    found = [letter for letter, text in options.items() if text.lower() in answer]
    return Reading(found[0], "text") if len(found) == 1 else UNREAD


def read_yes_no(answer: str, rules: Rules) -> Reading:
    """``Yes`` or ``No``, whichever alone is among the words. Source: ``YOrN_Extraction`` in the kit's ``yorn.py``."""
    words = without_punctuation(answer.lower(), rules).split()
    found = [value for value in ("Yes", "No") if value.lower() in words]
    return Reading(found[0], "word") if len(found) == 1 else UNREAD


def without_punctuation(text: str, rules: Rules) -> str:
    """Punctuation removed where it stands next to a space, or where a comma stands between digits anywhere; else
    replaced by a space. Source: ``process_punctuation`` in the kit's ``vlmeval/smp/misc.py``, after the VQA evaluation.
    """
    thousands, result = re.search(r"\d,\d", text), text
    for mark in PUNCTUATION:
        removed = thousands or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if removed else " ")
    return rules.full_stop.sub("", result, count=MAX_STOPS)


def normalise(text: str, rules: Rules) -> str:
    """A short answer as VQA accuracy compares it: without punctuation and articles, in lower case, words of numbers as
    digits, apostrophes of contractions put back."""
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip(), rules).lower()
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, truths: Sequence[str], rules: Rules) -> float:
    """In [0, 1]: the mean over the human answers of min(1, matches among the others / 3).

    Source: Antol et al. 2015, https://visualqa.org/evaluation; ``process_line`` in the kit's ``vqa_eval.py``.
    """
    given = normalise(prediction, rules)
    matches = [normalise(truth, rules) == given for truth in truths]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def read_mathvista(row: Mapping[str, str], answer: str, rules: Rules) -> Reading:
    """What the rules alone can read ("prefetch"): an option's letter, or a number, and that only if it is right.

    A right ``0`` is not read, as in the kit, which goes on to its judge there. Source: ``post_check`` in the kit's
    ``mathvista.py``.
    """
    if row["question_type"] == "multi_choice":
        return read_option(answer, _choices(row), rules)
    number = _right_number(row, answer)
    return Reading(str(number), "number") if number else UNREAD


def mathvista_right(row: Mapping[str, str], value: str, rules: Rules) -> bool:
    """Whether ``value``, read by the rules or by a judge, is the truth. Lists and free text are never right, nor is a
    number whose truth is written otherwise, as ``3.0`` for an integer: so it is in the kit."""
    if row["question_type"] == "multi_choice":
        return read_option(value, _choices(row), rules).value == row["answer_option"]
    return _right_number(row, value) is not None


def _right_number(row: Mapping[str, str], value: str) -> int | float | None:
    kind = {"integer": int, "float": float}.get(row["answer_type"])
    try:
        return kind(value) if kind is not None and kind(value) == kind(row["answer"]) else None
    except ValueError:
        return None


def _choices(row: Mapping[str, str]) -> dict[str, str]:
    return {chr(ord("A") + k): str(text) for k, text in enumerate(literal_list(row["choices"]) or [])}
