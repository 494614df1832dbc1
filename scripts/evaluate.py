"""Short-answer accuracy of a training run on a question file, with the image shown or blanked.

    python scripts/evaluate.py runs/demo --questions test.json --image_folder images --output answers.json

The question file is a JSON array of objects with ``id``, ``image``, ``question`` and ``answer``; each question is asked
in a conversation of its own. Every answer is kept in ``OUTPUT.unfinished`` as it is made: the same command continues
where it was stopped.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_moslora.errors import Refusal, run_script
from llava_moslora.evaluation.vqa import accuracy, ask, read_questions, with_images
from llava_moslora.files.disk import fsync, replace_json
from llava_moslora.files.manifest import sha256
from llava_moslora.inference.generate import first_logits
from llava_moslora.inference.load import load_run
from llava_moslora.runs.checkpoints import newest_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the --output_dir of a training")
    parser.add_argument("--questions", required=True, help="JSON array of questions")
    parser.add_argument("--image_folder", required=True)
    parser.add_argument("--untrained", action="store_true", help="the model as it was before the first training step")
    parser.add_argument("--blank", action="store_true", help="blank the images: how much is guessed from the questions")
    parser.add_argument("--output", help="write accuracy and answers to this JSON file")
    parser.add_argument("--probe", metavar="FILE", help="write the first-token logits of the first 32 questions there")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()

    if args.batch_size < 1:
        raise Refusal("C-FLAG", "out of range", key="--batch_size", found=args.batch_size, expected="at least 1")
    examples = read_questions(args.questions)
    output, probe = (writable(file, flag) for file, flag in ((args.output, "--output"), (args.probe, "--probe")))
    checkpoint = None if args.untrained else newest_checkpoint(Path(args.run))
    facts = {
        "run": str(Path(args.run).resolve()),
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "questions": sha256(Path(args.questions)),
        "image_folder": str(Path(args.image_folder).resolve()),
        "blank": args.blank,
        "batch_size": args.batch_size,
    }
    unfinished = None if output is None else output.with_name(output.name + ".unfinished")
    answers = [] if unfinished is None else earlier_answers(unfinished, facts, args.batch_size)
    chat_model = load_run(args.run, trained=not args.untrained, checkpoint=checkpoint)
    chat_model.model.to("cuda" if torch.cuda.is_available() else "cpu")
    questions = with_images(chat_model, examples, args.image_folder, blank=args.blank)
    if unfinished is not None:
        begun = unfinished.with_name(f".{unfinished.name}")
        begun.write_text("".join(json.dumps(line) + "\n" for line in (facts, *answers)), encoding="utf-8")
        os.replace(begun, unfinished)
    with open(unfinished or os.devnull, "a", encoding="utf-8") as kept:
        for text in ask(chat_model, questions[len(answers) :], batch_size=args.batch_size):
            answers.append(text)
            print(json.dumps(text), file=kept, flush=True)
    share = accuracy(examples, answers)
    if output is not None and unfinished is not None:
        replace_json(output, {"accuracy": share, "answers": answers})
        unfinished.unlink()
    print(f"{share:.1%} of {len(examples)} questions answered right")
    if probe is not None:
        logits = torch.stack([first_logits(chat_model, question) for question in questions[:32]])
        partial = probe.with_name(f".{probe.name}.unfinished")
        save_file({"logits": logits}, partial)
        fsync(partial)
        os.replace(partial, probe)


def writable(file: str | None, flag: str) -> Path | None:
    """The file to write, absolute and without links; None where none was asked for.

    Raises:
        Refusal: C-OUTPUT, it is not a file, or cannot be written.
    """
    if file is None:
        return None
    path = Path(file).resolve()
    if path.exists() and not path.is_file():
        raise Refusal("C-OUTPUT", "not a file", file=path, key=flag, fix="name a file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise Refusal(
            "C-OUTPUT", "nothing can be written in this folder", file=path.parent, key=flag, found=error.strerror,
            fix="make it, or choose another",
        ) from error  # fmt: skip


def earlier_answers(file: Path, facts: dict, batch_size: int) -> list[str]:
    """Answers of complete batches that the same evaluation kept in ``file`` before it was stopped.

    Raises:
        Refusal: C-OUTPUT, they are of another evaluation.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # the last has no end, or is empty
    try:
        earlier, *answers = map(json.loads, lines)
    except ValueError:
        earlier, answers = None, []
    if earlier == facts:
        answers = answers[: len(answers) // batch_size * batch_size]
        print(f"continuing after {len(answers)} answers of {file}")
        return answers
    if not any(line.strip() for line in lines[1:]):
        return []  # nothing was answered
    raise Refusal(
        "C-OUTPUT", "unfinished answers of another evaluation", file=file, key="--output",
        fix="move them away or delete them, or choose another --output",
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
