"""Subject-driven generation (the paper's section 4.3): draw a tuned SDXL's images, score them, have people judge them.

    python scripts/evaluate_subjects.py draw --base SDXL --subjects dreambooth --lora cat=exports/cat dog=exports/dog \\
        --identifier ikat --output drawn/moslora
    python scripts/evaluate_subjects.py score drawn/lora drawn/moslora --subjects dreambooth --clip CLIP --dino DINO \\
        --output results/subjects
    python scripts/evaluate_subjects.py kit drawn/lora drawn/moslora --subjects dreambooth --output human
    python scripts/evaluate_subjects.py count human/key.json answers-*.json

draw: every prompt of every subject, from the same latents for every method. score: CLIP-I, DINO and CLIP-T; of two
folders also their difference, with an interval over subjects. kit: one page with blind pairs, for people, and the key
that stays with you. count: who won, with intervals over people and pairs. Nothing is downloaded.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from llava_moslora.errors import Refusal, run_script, unknown_value
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries

# Step → how many folders or files it takes, the flags it needs, and those it may have besides.
STEPS: dict[str, tuple[range, tuple[str, ...], tuple[str, ...]]] = {
    "draw": (
        range(1), ("base", "subjects", "output"),
        ("lora", "identifier", "names", "seeds", "steps", "guidance", "size", "dtype"),
    ),
    "score": (range(1, 3), ("subjects",), ("clip", "dino", "names", "tie", "output")),
    "kit": (range(2, 3), ("subjects", "output"), ("names", "pairs", "seed")),
    "count": (range(2, 10_000), (), ("seed", "output")),
}  # fmt: skip
DEFAULTS = {"seeds": 4, "steps": 50, "guidance": 5.0, "dtype": "float16", "pairs": 8, "seed": 0, "tie": 0.5}
LEAST = {"seeds": 1, "steps": 1, "guidance": 0.0, "size": 64, "pairs": 1, "seed": 0, "tie": 0.0}


def parse(argv: list[str]) -> argparse.Namespace:
    """
    Raises:
        Refusal: C-FLAG, also of a flag that the step does not have, a missing one, or a number out of range.
    """
    parser = ScriptParser(__doc__)
    parser.add_argument("step", help=" | ".join(STEPS))
    parser.add_argument("inputs", nargs="*", help="drawn folders, A then B; for count the key and the answers")
    shared = parser.add_argument_group("of several steps")
    shared.add_argument("--output", metavar="FOLDER", help="folder to write into")
    shared.add_argument("--subjects", metavar="FOLDER", help="google/dreambooth's folder, or one like it")
    shared.add_argument("--names", nargs="+", metavar="NAME", help="only these subjects; default: all of the folder")
    shared.add_argument("--seed", type=int, metavar="N", help="of the kit's choice and of the intervals; 0 by default")
    draw = parser.add_argument_group("draw")
    draw.add_argument("--base", metavar="FOLDER", help="folder of the SDXL pipeline")
    draw.add_argument("--lora", nargs="+", metavar="SUBJECT=FOLDER", help="of each subject its exported LoRA")
    draw.add_argument(
        "--identifier", metavar="WORD", help="the word that stands for the subject in the training's prompt, as ikat"
    )
    draw.add_argument("--seeds", type=int, metavar="N", help="images of each prompt; 4 by default")
    draw.add_argument("--steps", type=int, metavar="N", help="of the sampler; 50 by default, as in the reference")
    draw.add_argument(
        "--guidance", type=float, metavar="X",
        help="how strictly the prompt is followed; 5.0 by default, as in diffusers' pipeline",
    )  # fmt: skip
    draw.add_argument("--size", type=int, metavar="N", help="pixels of a side; default: as the base was trained for")
    draw.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="float16 by default")
    score = parser.add_argument_group("score")
    score.add_argument("--clip", metavar="FOLDER", help="folder of CLIP ViT-B/32, for CLIP-I and CLIP-T")
    score.add_argument("--dino", metavar="FOLDER", help="folder of DINO ViT-S/16")
    score.add_argument(
        "--tie", type=float, metavar="X", help="scores closer than this count as a tie; 0.5 by default, of 100"
    )
    kit = parser.add_argument_group("kit")
    kit.add_argument(
        "--pairs", type=int, metavar="N", help="prompts of each subject in the kit; 8 by default, as in the paper"
    )
    args = parser.parse_args(argv)
    check_flags(args)
    return argparse.Namespace(**{k: DEFAULTS.get(k) if v is None else v for k, v in vars(args).items()})


def check_flags(args: argparse.Namespace) -> None:
    if args.step not in STEPS:
        raise unknown_value("STEP", args.step, list(STEPS), "unknown step")
    counts, needed, allowed = STEPS[args.step]
    given = {name for name, value in vars(args).items() if value is not None} - {"step", "inputs"}
    if lacking := [name for name in needed if name not in given]:
        raise Refusal("C-FLAG", f"missing: {args.step} needs it", key=f"--{lacking[0]}")
    if other := sorted(given - {*needed, *allowed}):
        raise Refusal("C-FLAG", f"has no effect with {args.step}", key=f"--{other[0]}", fix="leave it out")
    if len(args.inputs) not in counts:
        what = {"draw": "none", "score": "one or two drawn folders", "kit": "two drawn folders"}
        expected = what.get(args.step, "key.json and at least one file of answers")
        raise Refusal(
            "C-FLAG", f"{args.step} takes other inputs", found=" ".join(args.inputs) or "none", expected=expected
        )
    for name, least in LEAST.items():
        if (value := getattr(args, name)) is not None and not least <= value < 1e6:
            raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=f"at least {least}")
    if args.size is not None and args.size % 8:
        raise Refusal("C-FLAG", "not a multiple of 8", key="--size", found=args.size)
    if bool(args.lora) != bool(args.identifier):
        raise Refusal("C-FLAG", "one without the other", key="--lora, --identifier", fix="give both, or neither")


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

from llava_moslora.evaluation import human_kit
from llava_moslora.evaluation.output import locked, new_output
from llava_moslora.evaluation.subject_images import DrawnFolder, draw, load_pipeline, paired_images, read_drawn
from llava_moslora.evaluation.subject_scores import (
    compare_scores,
    difference_table,
    load_encoders,
    score_folder,
    scores_table,
)
from llava_moslora.evaluation.subjects import Subject, read_subjects
from llava_moslora.files.disk import replace_file, replace_json


def main() -> None:
    args = parse(sys.argv[1:])
    {"draw": draw_images, "score": score_images, "kit": make_kit, "count": count}[args.step](args)


def draw_images(args: argparse.Namespace) -> None:
    subjects = read_subjects(args.subjects, args.names or ())
    loras = lora_of(args.lora or [], subjects)
    if args.lora:
        subjects = [subject for subject in subjects if subject.name in loras]
    output = new_output(args.output)
    with locked(output / ".lock"):
        draw(
            load_pipeline(args.base, args.dtype), subjects, output, loras=loras, seeds=range(args.seeds),
            identifiers=dict.fromkeys([s.name for s in subjects], args.identifier or ""), base=args.base,
            steps=args.steps, guidance=args.guidance, size=args.size,
        )  # fmt: skip
    print(f"drawn: {output}")


def lora_of(words: list[str], subjects: list[Subject]) -> dict[str, Path]:
    """Subject → folder, of ``SUBJECT=FOLDER``."""
    loras: dict[str, Path] = {}
    known = [subject.name for subject in subjects]
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not folder or name not in known or name in loras:
            expected = f"SUBJECT=FOLDER, each subject once, of {' '.join(known)}"
            raise Refusal("C-FLAG", "not a subject and its LoRA", key="--lora", found=word, expected=expected)
        loras[name] = Path(folder)
    return loras


def score_images(args: argparse.Namespace) -> None:
    subjects = read_subjects(args.subjects, args.names or ())
    folders = [chosen(read_drawn(folder), args.names) for folder in args.inputs]
    if len(folders) == 2:
        paired_images(*folders)
    output = new_output(args.output) if args.output else None
    encoders = load_encoders(args.clip, args.dino)
    scores = [score_folder(folder, subjects, encoders) for folder in folders]
    text = scores_table(dict(zip(args.inputs, scores, strict=True)))
    content: dict = {"scores": [[asdict(image) | of for image, of in one.items()] for one in scores]}
    if len(scores) == 2:
        differences = compare_scores(*scores, tie=args.tie)
        text += f"\n\nA {args.inputs[0]}, B {args.inputs[1]}\n{difference_table(differences)}"
        content["differences"] = {metric: asdict(difference) for metric, difference in differences.items()}
    if output is not None:
        replace_file(output / "subjects.md", f"```\n{text}\n```\n".encode())
        replace_json(output / "subjects.json", content | {"folders": args.inputs, "clip": args.clip, "dino": args.dino})
    print(text)


def chosen(folder: DrawnFolder, names: list[str] | None) -> DrawnFolder:
    """Only the images of the subjects ``names``."""
    images = tuple(image for image in folder.images if names is None or image.subject in names)
    if not images:
        raise Refusal(
            "C-FLAG", "no images of these subjects", file=folder.folder, key="--names", found=" ".join(names or ())
        )
    return DrawnFolder(folder.folder, folder.settings, images)


def make_kit(args: argparse.Namespace) -> None:
    subjects = read_subjects(args.subjects, args.names or ())
    a, b = (chosen(read_drawn(folder), args.names) for folder in args.inputs)
    output = new_output(args.output)
    pairs = human_kit.write_kit(output, a, b, subjects, per_subject=args.pairs, seed=args.seed)
    print(f"{pairs} pairs: send {output / human_kit.KIT} to people, and keep {output / human_kit.KEY} to yourself")


def count(args: argparse.Namespace) -> None:
    found = human_kit.count_answers(Path(args.inputs[0]), [Path(file) for file in args.inputs[1:]], seed=args.seed)
    text = human_kit.preference_table(found, len(args.inputs) - 1)
    if args.output is not None:
        output = new_output(args.output)
        replace_json(output / "human.json", {question: asdict(p) for question, p in found.items()})
    print(text)


if __name__ == "__main__":
    run_script(main)
