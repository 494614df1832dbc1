"""The demo's table and image, from the answers that the demo wrote; fails when the export does not answer as the run.

Run by ``scripts/demo.sh``, whose last line shows the arguments.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from llava_moslora.evaluation.question_file import VqaExample, accuracy, normalise, read_questions

COLUMNS, SIDE, CAPTION = 4, 200, 78


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the demo's working folder")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--image_folder", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True, help="prior and majority, from playground/easy_vqa.py")
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
    print(f"\n{'EasyVQA, held-out test split':<32}{len(questions):>6} asked{'all ' + str(full['questions']):>12}")
    for name, share, of_all in rows:
        print(f"{name:<32}{share:>11.1%}{'' if of_all is None else format(of_all, '12.1%')}")

    run, merged = (load_file(args.folder / f"{name}.safetensors")["logits"] for name in ("after", "merged"))
    shared = min(run.shape[1], merged.shape[1])
    distance = (run[:, :shared] - merged[:, :shared]).abs().max().item()
    different = sum(a != b for a, b in zip(answers["after"], answers["merged"], strict=True))
    print(f"{'merged against run':<32}{different:>6} answers differ; logits within {distance:.1e}")
    draw(args.folder / "answers.png", questions, answers["after"], args.image_folder)
    print(f"image: {args.folder / 'answers.png'}")
    if different or distance > 1e-4:
        sys.exit("error: the merged model does not answer as the trained one")


def read(path: Path) -> list[str]:
    return json.loads(path.read_text(encoding="utf-8"))["answers"]


def draw(path: Path, questions: list[VqaExample], answers: list[str], image_folder: Path) -> None:
    """Twelve held-out images, each another one, with question, answer and truth; wrong answers in red."""
    first = {}
    for index, question in enumerate(questions):
        first.setdefault(question.image, index)
    chosen = list(first.values())[:12]
    font = ImageFont.load_default(size=14)
    sheet = Image.new("RGB", (COLUMNS * (SIDE + 20), -(-len(chosen) // COLUMNS) * (SIDE + CAPTION)), "white")
    canvas = ImageDraw.Draw(sheet)
    for place, index in enumerate(chosen):
        question, given = questions[index], answers[index]
        left, top = place % COLUMNS * (SIDE + 20) + 10, place // COLUMNS * (SIDE + CAPTION) + 8
        with Image.open(image_folder / question.image) as image:
            sheet.paste(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
        canvas.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline="#888888")
        right = normalise(given) == normalise(question.answer)
        for line, (text, colour) in enumerate(
            [
                (question.question, "black"),
                (f"answer: {given}", "#117733" if right else "#cc2222"),
                (f"truth: {question.answer}", "#555555"),
            ]
        ):
            size = 14 if canvas.textlength(text, font=font) <= SIDE + 10 else 10
            canvas.text((left, top + SIDE + 4 + 19 * line), text, fill=colour, font=ImageFont.load_default(size=size))
    sheet.save(path)


if __name__ == "__main__":
    main()
