"""EasyVQA's held-out questions in SEED-Bench's file format, for the demo's benchmark evaluation.

    python playground/easy_vqa_seed.py --data playground/data/easy_vqa --out playground/data/easy_vqa_as_seed

These are EasyVQA's questions, not SEED-Bench's. What they share is VLMEvalKit's file (``SEEDBench_IMG.tsv``: multiple
choice, images as base64), the prompt, and the rules that read and score the answers. Of each of 300 test images there
is one question that asks what, with the data set's own wording and answer. The other options are values of the same
attribute (four options for a colour, the three shapes for a shape), in a fixed random order: a random guess is right
in one case of four or three. The file is written atomically; a second run finds it and does nothing.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
from collections import Counter
from pathlib import Path

from easy_vqa import LETTERS, SEED, options_of, parse

from llava_moslora.errors import run_script
from llava_moslora.files.disk import replace_file

QUESTIONS = 300
COLUMNS = ("index", "image", "question", *LETTERS, "answer", "category")


def rows(questions: list[dict], count: int) -> list[dict[str, str]]:
    """One question about each of ``count`` images as columns of the file; ``image`` is the image's path."""
    rng = random.Random(SEED)
    of_image: dict[str, list[dict]] = {}
    for question in questions:
        if parse(question["question"])[0] is not None:
            of_image.setdefault(question["image"], []).append(question)
    made = []
    for number, image in enumerate(sorted(rng.sample(sorted(of_image), count))):
        chosen = rng.choice(of_image[image])
        attribute, _ = parse(chosen["question"])
        options = options_of(chosen["question"], chosen["answer"], rng)
        made.append({
            "index": str(number), "image": image, "question": chosen["question"], "category": attribute,
            "answer": LETTERS[options.index(chosen["answer"])], **dict(zip(LETTERS, options, strict=False)),
        })  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that playground/easy_vqa.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the file")
    args = parser.parse_args()
    file = args.out / "SEEDBench_IMG.tsv"
    if file.exists():
        print(f"{file} exists: nothing to do")
        return
    made = rows(json.loads((args.data / "test.json").read_text(encoding="utf-8")), QUESTIONS)
    lines = ["\t".join(COLUMNS)]
    for row in made:
        image = base64.b64encode((args.data / "images" / row["image"]).read_bytes()).decode()
        lines.append("\t".join((row | {"image": image}).get(column, "") for column in COLUMNS))
    args.out.mkdir(parents=True, exist_ok=True)
    replace_file(file, "".join(f"{line}\n" for line in lines).encode())
    asked, right = (Counter(row[column] for row in made) for column in ("category", "answer"))
    print(f"{file}: {len(made)} questions, one an image ({dict(asked)}; answers {dict(sorted(right.items()))})")


if __name__ == "__main__":
    run_script(main)
