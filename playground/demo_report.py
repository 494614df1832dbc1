"""The demo's table and images, from the answers that the demo wrote; fails if export and run differ.

Run by ``scripts/demo.sh``, whose last line shows the arguments.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from llava_moslora.noise import quiet_libraries

quiet_libraries()

from llava_moslora.data.images import load_image
from llava_moslora.evaluation.ask import read_answers
from llava_moslora.evaluation.question_file import VqaExample, accuracy, normalise, read_questions
from llava_moslora.evaluation.results import read_results
from llava_moslora.evaluation.scoring import options_of
from llava_moslora.evaluation.tsv import Table

COLUMNS, SIDE, CAPTION, SHOWN = 4, 200, 78, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the demo's working folder")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--image_folder", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True, help="prior and majority, from playground/easy_vqa.py")
    parser.add_argument("--choices", type=Path, required=True, help="the file of playground/easy_vqa_seed.py")
    args = parser.parse_args()

    questions = read_questions(args.questions)
    figures = json.loads(args.figures.read_text(encoding="utf-8"))
    chosen, full = figures[args.questions.stem], figures["test"]
    answers = {name: read(args.folder / f"{name}.json") for name in ("before", "after", "blanked", "merged")}
    rows = [
        (f"majority answer ({chosen['majority_answer']!r})", chosen["majority"], full["majority"]),
        ("question-only prior", chosen["question_only_prior"], full["question_only_prior"]),
        ("before training", accuracy(questions, answers["before"]), None),
        ("after training", accuracy(questions, answers["after"]), None),
        ("after, image blanked", accuracy(questions, answers["blanked"]), None),
        ("merged, stock transformers", accuracy(questions, answers["merged"]), None),
    ]
    print(f"\n{'EasyVQA, held-out test split':<32}{len(questions):>4} sampled{'all ' + str(full['questions']):>12}")
    for name, share, of_all in rows:
        print(f"{name:<32}{share:>11.1%}{'' if of_all is None else format(of_all, '12.1%')}")

    run, merged = (load_file(args.folder / f"{name}.safetensors")["logits"] for name in ("after", "merged"))
    shared = min(run.shape[1], merged.shape[1])
    distance = (run[:, :shared] - merged[:, :shared]).abs().max().item()
    different = sum(a != b for a, b in zip(answers["after"], answers["merged"], strict=True))
    print(f"{'merged vs. run':<32}{different:>6} answers differ; logits within {distance:.1e}")
    cards, choices = choice_cards(args.choices, args.folder / "seed")
    print(choices)
    for name, drawn in (("answers", answer_cards(questions, answers["after"], args.image_folder)), ("choices", cards)):
        draw(args.folder / f"{name}.png", drawn)
        print(f"image: {args.folder / name}.png")
    if different or distance > 1e-4:
        sys.exit("error: the merged model's answers or logits differ from the trained model's")


def read(path: Path) -> list[str]:
    return json.loads(path.read_text(encoding="utf-8"))["answers"]


@dataclass
class Card:
    """A question as the images show it: its image, a few lines below it, and whether the answer is right."""

    image: Image.Image
    question: str
    answer: str
    truth: str
    right: bool


def answer_cards(questions: list[VqaExample], answers: list[str], image_folder: Path) -> list[Card]:
    """Held-out questions, each about a different image."""
    first = {question.image: number for number, question in reversed(list(enumerate(questions)))}
    return [
        Card(
            load_image(q.image, image_folder), q.question, f"answer: {given}", f"truth: {q.answer}",
            normalise(given) == normalise(q.answer),
        )
        for q, given in ((questions[number], answers[number]) for number in sorted(first.values())[:SHOWN])
    ]  # fmt: skip


def choice_cards(file: Path, output: Path) -> tuple[list[Card], str]:
    """Cards of the first questions in SEED-Bench's format, and the evaluation's result as lines of the table."""
    table, result = Table(file), read_results(output)["seed"]
    _, answers = read_answers(output / "seed", {})
    options = [options_of(row) for row in table.rows]
    cards = []
    for number, (row, outcome) in enumerate(zip(table.rows[:SHOWN], result.score.outcomes, strict=False)):
        shown = "  ".join(f"{letter} {text}" for letter, text in options[number].items())
        given = f"answer: {answers[row['index']]} ({outcome.read or 'unread'})"
        cards.append(Card(table.images(number)[0], row["question"], given, shown, bool(outcome.right)))
    guess = sum(1 / len(found) for found in options) / len(options)
    assert result.score.value is not None and result.interval is not None  # only those with a judge have none
    title = "EasyVQA as multiple choice, in SEED-Bench's file format"
    interval = "95 % interval {:.1f} to {:.1f}".format(*result.interval)
    return cards, (
        f"\n{title}{len(table.rows):>6} questions\n{'random guess':<32}{guess:>11.1%}\n{'after training':<32}"
        f"{result.score.value / 100:>11.1%}   {interval}, unread {result.score.unread:.1%}"
    )


def draw(path: Path, cards: list[Card]) -> None:
    """Every card with its question, answer and truth; wrong answers in red."""
    font = ImageFont.load_default(size=14)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 20), -(-len(cards) // COLUMNS) * (SIDE + CAPTION)), "white")
    canvas = ImageDraw.Draw(sheet)
    for place, card in enumerate(cards):
        left, top = place % COLUMNS * (SIDE + 20) + 10, place // COLUMNS * (SIDE + CAPTION) + 8
        sheet.paste(card.image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
        canvas.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline="#888888")
        colour = "#117733" if card.right else "#cc2222"
        for line, (text, fill) in enumerate([(card.question, "black"), (card.answer, colour), (card.truth, "#555555")]):
            size = 14 if canvas.textlength(text, font=font) <= SIDE + 10 else 10
            canvas.text((left, top + SIDE + 4 + 19 * line), text, fill=fill, font=ImageFont.load_default(size=size))
    sheet.save(path)


if __name__ == "__main__":
    main()
