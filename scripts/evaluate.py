"""Short-answer accuracy of a training run on a question file, with the picture shown or blanked.

    python scripts/evaluate.py runs/demo --questions test.json --image_folder images --output answers.json

The question file is a JSON array of objects with ``id``, ``image``, ``question`` and ``answer``; each question is asked
in a conversation of its own.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_moslora.errors import run_script
from llava_moslora.evaluation.vqa import accuracy, ask, read_questions, with_pictures
from llava_moslora.inference.generate import first_logits
from llava_moslora.inference.load import load_run
from llava_moslora.runs.manifest import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the --output_dir of a training")
    parser.add_argument("--questions", required=True, help="JSON array of questions")
    parser.add_argument("--image_folder", required=True)
    parser.add_argument("--untrained", action="store_true", help="the model as it was before the first step")
    parser.add_argument(
        "--blank", action="store_true", help="blank the picture: what is guessed from the question alone"
    )
    parser.add_argument("--output", help="write accuracy and answers to this JSON file")
    parser.add_argument("--probe", metavar="FILE", help="write the first-token logits of the first 32 questions there")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()

    questions = read_questions(args.questions)
    answerer = load_run(args.run, trained=not args.untrained)
    answerer.model.to("cuda" if torch.cuda.is_available() else "cpu")
    asked = with_pictures(answerer, questions, args.image_folder, blank=args.blank)
    answers = ask(answerer, asked, batch_size=args.batch_size)
    share = accuracy(questions, answers)
    print(f"{share:.1%} of {len(questions)} questions answered right")
    if args.output:
        write_json(Path(args.output), {"accuracy": share, "answers": answers})
    if args.probe:
        save_file({"logits": torch.stack([first_logits(answerer, question) for question in asked[:32]])}, args.probe)


if __name__ == "__main__":
    run_script(main)
