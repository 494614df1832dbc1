"""EasyVQA as LLaVA JSON: the demo's images and questions.

    python playground/easy_vqa.py --packages playground/data/packages --out playground/data/easy_vqa

EasyVQA (MIT) is a public set of 64×64 drawings of one coloured shape, with its own training and test split. The
folder is written atomically; a second run finds it and does nothing. It contains::

    images/{train,test}/<id>.png   the images; the paths in the files below start at images/
    train.json      training questions that cannot be guessed, as LLaVA records of up to three turns; half of those that
                    ask what are multiple choice
    captions.json   "a red circle" for the training images whose questions settle it: the projector's pretraining
    test.json       every test question, asked alone: {id, image, question, answer}
    test_400.json   400 of them with the same mix of answers and wordings
    figures.json    what answering without looking scores, on both test files

Questions and answers are the data set's own, letter for letter; options and their letters are added. The captions are
deduced from the training split's questions and answers, never from the pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

from llava_moslora.errors import Refusal, run_script

SEED = 0
TURNS = 3  # question/answer turns in one training record
SUBSET = 400
VALUES = {
    "shape": ("circle", "rectangle", "triangle"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
LETTERS, PROMPT = "ABCD", "Answer with the option's letter from the given choices directly."  # as in LLaVA-1.5's data
Row = list  # [question, answer, image id], as in the data set


class Knowledge:
    """What a series of questions and answers about one image tells: the values each attribute can still have."""

    def __init__(self):
        self.possible = {attribute: set(values) for attribute, values in VALUES.items()}

    def determines(self, question: str) -> bool:
        """Whether the answer to ``question`` follows from what is known and from the question's own wording."""
        asked, named = parse(question)
        if asked is not None:
            return len(self.possible[asked]) == 1
        ((attribute, value),) = named.items()
        return value not in self.possible[attribute] or len(self.possible[attribute]) == 1

    def learn(self, question: str, answer: str) -> None:
        asked, named = parse(question)
        if asked is not None:  # "what color is the circle?" also says that it is a circle
            for attribute, value in {**named, asked: answer}.items():
                self.possible[attribute] &= {value}
            return
        ((attribute, value),) = named.items()
        present = (answer == "yes") != bool(re.search(r"\b(no|not)\b", question))
        self.possible[attribute] &= {value} if present else self.possible[attribute] - {value}

    def caption(self) -> str | None:
        """``a red circle``; ``None`` where shape or colour is not settled."""
        if any(len(values) > 1 for values in self.possible.values()):
            return None
        (color,), (shape,) = self.possible["color"], self.possible["shape"]
        return f"a {color} {shape}"


def parse(question: str) -> tuple[str | None, dict[str, str]]:
    """The attribute asked for (``None`` in a yes/no question) and the attribute values that the question names."""
    words = re.findall(r"[a-z]+", question)
    named = {attribute: word for word in words for attribute, values in VALUES.items() if word in values}
    if words[0] != "what":
        return None, named
    return "color" if "color" in words else "shape", named


def by_image(rows: list[Row]) -> dict[int, list[tuple[str, str]]]:
    images = defaultdict(list)
    for question, answer, image in rows:
        images[image].append((question, answer))
    return dict(sorted(images.items()))


def balanced(rows: list[Row]) -> list[Row]:
    """Training questions of which the wording tells nothing, in a fixed random choice.

    Four of five yes/no questions have the answer that their wording suggests ("is there a red circle?": no). A short
    training on all of them learns the wording and stays there. So every yes/no question with the other answer is kept
    and as many with the suggested one, and of the questions that ask what, one per image.
    """
    rng = random.Random(SEED)
    guesses = blind_guesses(rows)
    yes_no = [row for row in rows if row[1] in ("yes", "no")]
    other = [row for row in yes_no if guesses[row[0]] != row[1]]
    suggested = rng.sample([row for row in yes_no if guesses[row[0]] == row[1]], len(other))
    what = [row for row in rows if row[1] not in ("yes", "no")]
    rng.shuffle(what)
    one_each = list({image: (question, answer, image) for question, answer, image in what}.values())
    return [list(row) for row in (*other, *suggested, *one_each)]


def train_records(rows: list[Row]) -> list[dict]:
    """Every question of ``rows`` once, in records of up to ``TURNS`` turns, in a fixed random order.

    A turn whose answer follows from the turns before it can be answered without looking. So each question goes to the
    first of the image's records that does not give its answer away, and only where all do, to one that does.
    """
    rng = random.Random(SEED)
    records = []
    for image, turns in by_image(rows).items():
        rng.shuffle(turns)
        groups = [([], Knowledge()) for _ in range(-(-len(turns) // TURNS))]
        for question, answer in turns:
            free = [group for group in groups if len(group[0]) < TURNS]
            group, known = next((g for g in free if not g[1].determines(question)), free[-1])
            group.append((question, answer))
            known.learn(question, answer)
        for number, (group, _) in enumerate(groups):
            if group:
                records.append(record(f"train-{image}-{number}", f"train/{image}.png", group))
    rng.shuffle(records)
    return records


def options_of(question: str, answer: str, rng: random.Random) -> list[str]:
    """The answer among other values of its attribute, four in all or as many as there are, in a random order."""
    attribute, _ = parse(question)
    others = [value for value in VALUES[attribute] if value != answer]
    options = rng.sample(others, min(len(others), len(LETTERS) - 1)) + [answer]
    rng.shuffle(options)
    return options


def with_choices(records: list[dict]) -> list[dict]:
    """The records with every other question that asks what as multiple choice, answered by the option's letter."""
    rng, asked = random.Random(SEED), 0
    for item in records:
        turns = item["conversations"]
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            question = human["value"].removeprefix("<image>\n")
            if parse(question)[0] is None:
                continue
            asked += 1
            if asked % 2:
                options = options_of(question, gpt["value"], rng)
                lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
                human["value"] = "\n".join([human["value"], *lines, PROMPT])
                gpt["value"] = LETTERS[options.index(gpt["value"])]
    return records


def record(identity: str, image: str, turns: list[tuple[str, str]]) -> dict:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        opening = "<image>\n" if number == 0 else ""
        conversations += [{"from": "human", "value": opening + question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": image, "conversations": conversations}


def caption_records(rows: list[Row]) -> list[dict]:
    """``<image>`` and the caption, for each training image whose questions and answers settle shape and colour."""
    records = []
    for image, turns in by_image(rows).items():
        known = Knowledge()
        for question, answer in turns:
            known.learn(question, answer)
        assert all(known.possible.values()), f"the questions about training image {image} contradict each other"
        if (caption := known.caption()) is not None:
            conversation = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
            records.append({"id": f"caption-{image}", "image": f"train/{image}.png", "conversations": conversation})
    random.Random(SEED).shuffle(records)
    return records


def subset(questions: list[dict], size: int, guesses: dict[str, str]) -> list[dict]:
    """``size`` questions whose answers, wordings and blind guesses are right as often as in all of them.

    They lie at even steps through all questions in the order of these three; the order within a wording is random.
    """
    rng = random.Random(SEED)
    shuffled = rng.sample(questions, len(questions))
    ordered = sorted(shuffled, key=lambda q: (guesses[q["question"]] == q["answer"], q["answer"], q["question"]))
    step, start = len(ordered) / size, rng.random()
    chosen = {ordered[int((i + start) * step)]["id"] for i in range(size)}
    return [q for q in questions if q["id"] in chosen]


def blind_guesses(train: list[Row]) -> dict[str, str]:
    """For every wording of a question, its most frequent answer in the training split: the best one without looking."""
    answers = defaultdict(Counter)
    for question, answer, _ in train:
        answers[question][answer] += 1
    return {question: counts.most_common(1)[0][0] for question, counts in answers.items()}


def blind_scores(train: list[Row], questions: list[dict]) -> dict[str, float | int | str]:
    """What answers chosen on the training split, without the image, score on ``questions``: shares of 1."""
    guesses = blind_guesses(train)
    majority = Counter(answer for _, answer, _ in train).most_common(1)[0][0]
    return {
        "questions": len(questions),
        "images": len({q["image"] for q in questions}),
        "majority_answer": majority,
        "majority": sum(q["answer"] == majority for q in questions) / len(questions),
        "question_only_prior": sum(guesses[q["question"]] == q["answer"] for q in questions) / len(questions),
    }


def given_away(records: list[dict]) -> tuple[int, int]:
    """(later turns whose answer follows from the turns before, later turns) over all records."""
    leaked = total = 0
    for item in records:
        known = Knowledge()
        values = [turn["value"].removeprefix("<image>\n") for turn in item["conversations"]]
        for number, (question, answer) in enumerate(zip(values[::2], values[1::2], strict=True)):
            if number:
                total += 1
                leaked += known.determines(question)
            known.learn(question, answer)
    return leaked, total


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder the easy-vqa package was installed into")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet")
    args = parser.parse_args()
    if args.out.exists():
        print(f"{args.out} exists: nothing to do")
        return
    source = args.packages / "easy_vqa" / "data"
    for split in ("train", "test"):
        if not (source / split / "questions.json").is_file():
            raise Refusal(
                "D-MISSING", "the EasyVQA questions are not there", file=source / split / "questions.json",
                fix=f"pip install --no-deps --target {args.packages} easy-vqa==1.0",
            )  # fmt: skip
    train, test = (json.loads((source / s / "questions.json").read_text(encoding="utf-8")) for s in ("train", "test"))

    questions = [
        {"id": f"test-{number}", "image": f"test/{image}.png", "question": question, "answer": answer}
        for number, (question, answer, image) in enumerate(test)
    ]
    few = subset(questions, SUBSET, blind_guesses(train))
    chosen = balanced(train)
    records, captions = train_records(chosen), caption_records(train)
    leaked, later = given_away(records)
    records = with_choices(records)
    figures = {"test": blind_scores(train, questions), f"test_{SUBSET}": blind_scores(train, few)}

    staging = args.out.parent / f".{args.out.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    for split in ("train", "test"):
        shutil.copytree(source / split / "images", staging / "images" / split)
    missing = [r["image"] for r in records + captions + questions if not (staging / "images" / r["image"]).is_file()]
    if missing:
        raise Refusal("I-MISSING", f"{len(missing)} images are not in the package", file=source, found=missing[0])
    write_json(staging / "train.json", records)
    write_json(staging / "captions.json", captions)
    write_json(staging / "test.json", questions)
    write_json(staging / f"test_{SUBSET}.json", few)
    write_json(staging / "figures.json", figures)
    os.rename(staging, args.out)

    print(f"{args.out}:")
    wordings = {caption["conversations"][1]["value"] for caption in captions}
    images = len(by_image(chosen))
    print(f"  train    {images:4} images  {len(chosen):5} questions  in {len(records)} records of ≤ {TURNS} turns")
    print(f"           {leaked / later:.1%} of the later turns follow from the turns before them")
    print(f"           {len(captions)} captions, {len(wordings)} different ones")
    for name, f in figures.items():
        print(
            f"  {name:8} {f['images']:4} images  {f['questions']:5} questions  always {f['majority_answer']!r} "
            f"{f['majority']:.1%}, best answer to the question alone {f['question_only_prior']:.1%}"
        )


if __name__ == "__main__":
    run_script(main)
