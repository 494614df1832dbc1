"""The paper's human evaluation (Table 6): blind, shuffled pairs of images, rated in a page, counted afterwards.

``kit.html`` is one self-contained file: photos of the subject, the prompt, two images side by side, two questions.
Only ``key.json`` says which method made which image; it stays with the experimenter. A rater's answers are a JSON
file that the page offers to save::

    {"kit": "6fb1…", "person": "Ada", "answers": {"1": {"similarity": "left", "prompt": "same"}, …}}
"""

from __future__ import annotations

import hashlib
import html
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_moslora import pages
from llava_moslora.errors import Refusal
from llava_moslora.evaluation.compare import RESAMPLES, bonett_price, interval
from llava_moslora.evaluation.human_kit_page import SCRIPT, STYLE
from llava_moslora.evaluation.subject_images import Drawn, DrawnFolder, paired_images
from llava_moslora.evaluation.subjects import Subject
from llava_moslora.files.disk import read_json, replace_json, replacing

KIT, KEY = "kit.html", "key.json"
QUESTIONS = {
    "similarity": "Which image shows the subject of the photos more faithfully?",
    "prompt": "Which image fits the text better?",
}
CHOICES = ("left", "same", "right")
SIDE, PHOTOS_SHOWN = 512, 3  # pixels of an image; photos of the subject beside a pair


def choose_pairs(images: Sequence[Drawn], per_subject: int, seed: int) -> list[Drawn]:
    """The given number of images per subject, each with a different prompt, in an order fixed by ``seed``.

    Raises:
        Refusal: C-FLAG, a subject has fewer prompts.
    """
    generator, chosen = random.Random(seed), []
    for subject in dict.fromkeys(image.subject for image in images):
        by_prompt: dict[int, list[Drawn]] = {}
        for image in images:
            if image.subject == subject:
                by_prompt.setdefault(image.number, []).append(image)
        if len(by_prompt) < per_subject:
            raise Refusal(
                "C-FLAG", "more than the prompts of a subject", key="--pairs", found=per_subject,
                expected=f"at most {len(by_prompt)}, the prompts of {subject}",
            )  # fmt: skip
        chosen += [generator.choice(by_prompt[number]) for number in generator.sample(sorted(by_prompt), per_subject)]
    generator.shuffle(chosen)
    return chosen


def write_kit(
    output: Path, a: DrawnFolder, b: DrawnFolder, subjects: Sequence[Subject], *, per_subject: int, seed: int
) -> int:
    """Write the page and its key into ``output``; returns how many pairs it has.

    Raises:
        Refusal: C-COMPARE, C-FLAG; C-OUTPUT, a kit already exists: answers to it may still arrive.
    """
    chosen = choose_pairs(paired_images(a, b), per_subject, seed)
    known = {subject.name: subject for subject in subjects}
    if missing := {image.subject for image in chosen} - set(known):
        raise Refusal("C-COMPARE", "images of a subject that is not in --subjects", file=a.folder, found=missing.pop())
    generator = random.Random(f"sides {seed}")
    left_is_b = [generator.random() < 0.5 for _ in chosen]
    contents = [image.name for image in chosen], left_is_b, seed, str(a.folder), str(b.folder)
    kit = hashlib.sha256(repr(contents).encode()).hexdigest()[:16]
    key = {
        "kit": kit, "A": str(a.folder), "B": str(b.folder),
        "pairs": [
            {"image": image.name, "prompt": image.prompt, "left": "B" if flipped else "A"}
            for image, flipped in zip(chosen, left_is_b, strict=True)
        ],
    }  # fmt: skip
    # The key is written first: without a page there are no answers yet, and the same command continues.
    if (output / KIT).exists() or ((output / KEY).exists() and read_json(output / KEY) != key):
        raise Refusal("C-OUTPUT", "a kit already exists", file=output, key="--output", fix="choose another folder")
    replace_json(output / KEY, key)
    photos = {name: [pages.thumbnail(one, 256) for one in known[name].images()[:PHOTOS_SHOWN]] for name in known}
    with replacing(output / KIT) as stream:
        stream.write(pages.begin("Which image is better?", STYLE, SCRIPT).encode())
        stream.write(_opening(kit, len(chosen)).encode())
        for number, (image, flipped) in enumerate(zip(chosen, left_is_b, strict=True), 1):
            sides = (b, a) if flipped else (a, b)
            drawn = [pages.thumbnail(folder.open(image), SIDE) for folder in sides]
            stream.write(_pair(number, image.prompt, photos[image.subject], drawn).encode())
        stream.write(f"<p><button id=save>Save the answers</button> <output></output></p>{pages.END}".encode())
    return len(chosen)


def _opening(kit: str, pairs: int) -> str:
    return (
        f'<main data-kit="{kit}"></main><p>{pairs} pairs. Both images of a pair were made for the same text; '
        "the photos show the subject that they should show. Please answer both questions of every pair, then save "
        "the answers and send the file back.</p><p>"
        "<label>Your name or number: <input id=person autocomplete=off></label></p>"
    )


def _pair(number: int, prompt: str, photos: Sequence[str], drawn: Sequence[str]) -> str:
    questions = "".join(
        f"<fieldset><legend>{html.escape(text)}</legend>"
        + "".join(
            f'<label><input type=radio name="{number} {name}" value={choice}>{choice}</label> ' for choice in CHOICES
        )
        + "</fieldset>"
        for name, text in QUESTIONS.items()
    )
    return (
        f"<article data-pair={number}><h2>{number}</h2><div class=photos>{''.join(photos)}</div>"
        f"<p class=prompt>{html.escape(prompt)}</p><div class=two>"
        f"<figure>{drawn[0]}<figcaption>left</figcaption></figure>"
        f"<figure>{drawn[1]}<figcaption>right</figcaption></figure></div>{questions}</article>"
    )


@dataclass(frozen=True)
class Preference:
    """One question's shares in percent of judgements that prefer B, neither, and A; ``points`` = win − loss with
    its 95 % interval over raters and pairs; ``judgements`` their number."""

    win: float
    tie: float
    loss: float
    points: float
    low: float
    high: float
    judgements: int


def count_answers(key_file: Path, answer_files: Sequence[Path], *, seed: int = 0) -> dict[str, Preference]:
    """Question → how B was judged next to A.

    The interval resamples people and pairs, each with replacement (Owen 2007, the pigeonhole bootstrap): judgements of
    one person, or of one pair, are no independent ones. Where all judgements are alike, no draw differs from another:
    then it is Bonett and Price's, of as many judgements as there are people, or pairs if these are fewer. A single
    person, or pair, says nothing about others: then the other number counts.

    Raises:
        Refusal: K-JSON, a file is not of this form; C-COMPARE, answers to another kit, or a person's twice.
    """
    key = _read(key_file, "give the key.json that kit wrote")
    try:
        left = {str(number): pair["left"] for number, pair in enumerate(key["pairs"], 1)}
        kit = str(key["kit"])
        if not left or not set(left.values()) <= {"A", "B"}:
            raise ValueError("no pairs, or a side that is neither A nor B")
    except (KeyError, TypeError, ValueError) as error:
        fix = "give the key.json that kit wrote"
        raise Refusal("K-JSON", "not the key of a kit", file=key_file, found=repr(error), fix=fix) from error
    people: dict[str, dict[str, Any]] = {}
    for file in answer_files:
        person, answers = _read_answers(file, kit, left)
        if person in people:
            raise Refusal("C-COMPARE", "a second file of the same person", file=file, key="person", found=person)
        people[person] = answers
    return {question: _preference(left, list(people.values()), question, seed) for question in QUESTIONS}


def _read(file: Path, fix: str) -> dict[str, Any]:
    if not file.is_file():
        what = "a folder, not a file" if file.is_dir() else "no such file"
        raise Refusal("K-MISSING", what, file=file, fix=fix)
    return read_json(file)


def _read_answers(file: Path, kit: str, left: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    content = _read(file, "give the file that a person saved in the page")
    if content.get("kit") != kit:
        fix = "give the key of the kit that was judged"
        raise Refusal(
            "C-COMPARE",
            "answers to a different kit",
            file=file,
            key="kit",
            found=content.get("kit"),
            expected=kit,
            fix=fix,
        )
    person, answers = content.get("person"), content.get("answers")
    if not (isinstance(person, str) and person.strip() and isinstance(answers, dict)):
        raise Refusal("K-JSON", "without a person's name, or without answers", file=file, fix="save the page's file")
    for number, answer in answers.items():
        good = number in left and isinstance(answer, dict) and set(answer) <= set(QUESTIONS)
        if not good or not set(map(str, answer.values())) <= set(CHOICES):
            raise Refusal("K-JSON", "not an answer of the page", file=file, key=number, found=json.dumps(answer)[:80])
    return person.strip(), answers


def _preference(left: Mapping[str, str], people: Sequence[Mapping[str, Any]], question: str, seed: int) -> Preference:
    values = np.full((len(people), len(left)), np.nan)
    for row, answers in enumerate(people):
        for column, (number, side) in enumerate(left.items()):
            choice = answers.get(number, {}).get(question)
            if choice is not None:
                values[row, column] = 0 if choice == "same" else 1 if (choice == "left") == (side == "B") else -1
    there = ~np.isnan(values)
    count = int(there.sum())
    if count == 0:
        raise Refusal("C-COMPARE", "no answer to a question", key=question)
    filled, generator = np.nan_to_num(values), np.random.default_rng(seed)
    rows = generator.multinomial(len(people), np.full(len(people), 1 / len(people)), size=RESAMPLES)
    columns = generator.multinomial(len(left), np.full(len(left), 1 / len(left)), size=RESAMPLES)
    sums = ((rows @ filled) * columns).sum(axis=1)
    counts = ((rows @ there.astype(float)) * columns).sum(axis=1)
    low, high = interval(100 * sums[counts > 0] / counts[counts > 0])
    wins, ties, losses = (int((values[there] == v).sum()) for v in (1, 0, -1))
    if count in (wins, ties, losses):
        several = [n for n in (int(there.any(axis=1).sum()), int(there.any(axis=0).sum())) if n > 1]
        independent = min(several, default=1)
        won, lost = independent * (wins == count), independent * (losses == count)
        low, high = bonett_price(won, lost, independent)
    win, tie, loss = (100 * n / count for n in (wins, ties, losses))
    return Preference(win, tie, loss, win - loss, low, high, count)


def preference_table(found: Mapping[str, Preference], people: int) -> str:
    """A table like the paper's Table 6."""
    lines = [f"{'B against A':<12}{'win':>8}{'tie':>8}{'loss':>8}{'win - loss':>12}{'95 %':>18}{'judgements':>12}"]
    for question, p in found.items():
        span = f"{p.low:+.1f} to {p.high:+.1f}"
        lines.append(
            f"{question:<12}{p.win:>8.1f}{p.tie:>8.1f}{p.loss:>8.1f}{p.points:>+12.1f}{span:>18}{p.judgements:>12}"
        )
    return "\n".join([*lines, f"{people} raters; intervals over raters and pairs"])
