"""Subject-driven generation (the paper's section 4.3): generate a tuned SDXL's images, score them, have people judge.

    python scripts/evaluate_subjects.py draw --base SDXL --subjects dreambooth --lora cat=exports/cat dog=exports/dog \\
        --identifier ikat --output drawn/moslora
    python scripts/evaluate_subjects.py score drawn/lora drawn/moslora --subjects dreambooth --clip CLIP --dino DINO
    python scripts/evaluate_subjects.py kit drawn/lora drawn/moslora --subjects dreambooth --output human
    python scripts/evaluate_subjects.py count human/key.json answers-*.json

draw: every prompt of every subject, from the same latents for every method. score: CLIP-I, DINO and CLIP-T; of two
folders also their difference, with an interval over subjects. kit: one page with blind pairs, for people, and the key
that stays with you. count: who won, with intervals over people and pairs. Nothing is downloaded.
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llava_moslora.errors import Refusal, run_script, unknown_value
from llava_moslora.flags import WIDTH, ScriptParser
from llava_moslora.noise import quiet_libraries, quiet_loading


class Step(NamedTuple):
    """``inputs``: what it takes besides flags, and ``counts`` of them; the flags it needs, and others it may have."""

    counts: range
    inputs: str
    needed: tuple[str, ...]
    allowed: tuple[str, ...]


STEPS = {
    "draw": Step(
        range(1), "none", ("base", "subjects", "output"),
        ("lora", "identifier", "names", "seeds", "steps", "guidance", "size", "dtype"),
    ),
    "score": Step(range(1, 3), "one or two drawn folders", ("subjects",), ("clip", "dino", "names", "tie", "output")),
    "kit": Step(range(2, 3), "two drawn folders", ("subjects", "output"), ("names", "pairs", "seed")),
    "count": Step(range(2, 10_000), "key.json and at least one file of answers", (), ("seed", "output")),
}  # fmt: skip
DEFAULTS = {"seeds": 4, "steps": 50, "guidance": 5.0, "dtype": "float16", "pairs": 8, "seed": 0, "tie": 0.5}
LEAST = {"seeds": 1, "steps": 1, "guidance": 0.0, "size": 64, "pairs": 1, "seed": 0, "tie": 0.0}
SEVERAL, DTYPES = "several steps", ("float16", "bfloat16", "float32")
# Flag → its heading in --help, a step where it belongs to one alone; how it is read; and its text.
FLAGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "base": ("draw", {}, "folder of the SDXL pipeline"),
    "lora": ("draw", {"nargs": "+", "metavar": "SUBJECT=FOLDER"}, "the exported LoRA of each subject"),
    "identifier": ("draw", {"metavar": "WORD"}, "the subject's word in the training prompt, such as ikat; with --lora"),
    "seeds": ("draw", {"type": int, "metavar": "N"}, "images per prompt"),
    "steps": ("draw", {"type": int, "metavar": "N"}, "sampler steps, as in the reference"),
    "guidance": ("draw", {"type": float, "metavar": "X"}, "as in diffusers' pipeline"),
    "size": ("draw", {"type": int, "metavar": "PIXELS"}, "image size; default: the base's training size"),
    "dtype": ("draw", {"choices": DTYPES, "metavar": "TYPE"}, " | ".join(DTYPES)),
    "clip": ("score", {}, "folder of CLIP ViT-B/32, for CLIP-I and CLIP-T"),
    "dino": ("score", {}, "folder of DINO ViT-S/16; one of the two, or both"),
    "tie": ("score", {"type": float, "metavar": "POINTS"}, "of 100: a smaller difference counts as a tie"),
    "pairs": ("kit", {"type": int, "metavar": "N"}, "prompts of each subject, as in the paper"),
    "subjects": (SEVERAL, {}, "google/dreambooth's folder, or one like it"),
    "names": (SEVERAL, {"nargs": "+", "metavar": "SUBJECT"}, "only these; default: all of the folder"),
    "seed": (SEVERAL, {"type": int, "metavar": "N"}, "of the kit's choice, and of the intervals"),
    "output": (SEVERAL, {"metavar": "FOLDER"}, "to write into; score and count print without it too"),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """
    Raises:
        Refusal: C-FLAG, also of a flag that the step does not have, a missing one, or a number out of range.
    """
    form = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH, max_help_position=24)
    parser = ScriptParser(__doc__, usage="%(prog)s STEP [INPUT ...] --FLAG VALUE ...", formatter_class=form)
    parser.add_argument("step", metavar="STEP", help=" | ".join(STEPS))
    parser.add_argument("inputs", metavar="INPUT", nargs="*", help="drawn folders, A then B; for count the files")
    groups = {name: parser.add_argument_group(name, told(step)) for name, step in STEPS.items()}
    groups[SEVERAL] = parser.add_argument_group(SEVERAL)
    for name, (heading, how, text) in FLAGS.items():
        where = ", ".join(step for step, s in STEPS.items() if name in (*s.needed, *s.allowed))
        text = f"{where}: {text}" if heading == SEVERAL else text
        text += f"; default: {DEFAULTS[name]}" if name in DEFAULTS else ""
        groups[heading].add_argument(f"--{name}", **{"metavar": "FOLDER"} | how, help=text)
    args = parser.parse_args(argv)
    check_flags(args)
    return argparse.Namespace(**{k: DEFAULTS.get(k) if v is None else v for k, v in vars(args).items()})


def told(step: Step) -> str:
    """What a step takes, for --help."""
    also = [name for name in step.allowed if FLAGS[name][0] == SEVERAL]
    parts = ["inputs: " + step.inputs]
    parts += [f"needs {' '.join(f'--{name}' for name in step.needed)}"] if step.needed else []
    parts += [f"may have {' '.join(f'--{name}' for name in also)}"] if also else []
    return "; ".join(parts)


def check_flags(args: argparse.Namespace) -> None:
    if args.step not in STEPS:
        raise unknown_value("STEP", args.step, list(STEPS), "unknown step")
    counts, expected, needed, allowed = STEPS[args.step]
    given = {name for name, value in vars(args).items() if value is not None} - {"step", "inputs"}
    if lacking := [name for name in needed if name not in given]:
        raise Refusal("C-FLAG", f"missing: {args.step} needs it", key=f"--{lacking[0]}")
    if other := sorted(given - {*needed, *allowed}):
        raise Refusal("C-FLAG", f"has no effect with {args.step}", key=f"--{other[0]}", fix="omit it")
    if len(args.inputs) not in counts:
        raise Refusal(
            "C-FLAG", f"{args.step} takes other inputs", found=" ".join(args.inputs) or "none", expected=expected
        )
    for name, least in LEAST.items():
        if (value := getattr(args, name)) is not None and not least <= value < 1e6:
            raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=f"at least {least}")
    if args.size is not None and args.size % 8:
        fix = f"{args.size // 8 * 8}, or omit it"
        raise Refusal("C-FLAG", "not a multiple of 8", key="--size", found=args.size, fix=fix)
    if args.identifier is not None and not args.identifier.strip():
        fix = "the word of the training's prompt, as ikat"
        raise Refusal("C-FLAG", "an empty word", key="--identifier", found=repr(args.identifier), fix=fix)
    if bool(args.lora) != bool(args.identifier):
        raise Refusal("C-FLAG", "one without the other", key="--lora, --identifier", fix="give both, or neither")


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

from llava_moslora.evaluation import human_kit
from llava_moslora.evaluation.output import check_output, locked, new_output
from llava_moslora.evaluation.subject_images import (
    DrawnFolder,
    draw,
    load_pipeline,
    lora_file,
    paired_images,
    read_drawn,
)
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
    check_output(args.output)
    quiet_loading()
    pipeline = load_pipeline(args.base, args.dtype)  # before the folder is made: the base may be a wrong one
    output = new_output(args.output)
    with locked(output / ".lock"):
        draw(
            pipeline, subjects, output, loras=loras, seeds=range(args.seeds),
            identifiers=dict.fromkeys([s.name for s in subjects], args.identifier or ""), base=args.base,
            steps=args.steps, guidance=args.guidance, size=args.size,
        )  # fmt: skip
    print(f"drawn: {output}")


def lora_of(words: list[str], subjects: list[Subject]) -> dict[str, Path]:
    """Subject → file, of ``SUBJECT=FOLDER``."""
    loras: dict[str, Path] = {}
    known = [subject.name for subject in subjects]
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or not folder or name not in known or name in loras:
            expected = f"SUBJECT=FOLDER, each subject once, of {' '.join(known)}"
            raise Refusal("C-FLAG", "not a subject and its LoRA", key="--lora", found=word, expected=expected)
        loras[name] = lora_file(folder)
    return loras


def score_images(args: argparse.Namespace) -> None:
    subjects = read_subjects(args.subjects, args.names or ())
    folders = [chosen(read_drawn(folder), args.names) for folder in args.inputs]
    if len(folders) == 2:
        paired_images(*folders)
    if args.output:
        check_output(args.output)
    quiet_loading()
    encoders = load_encoders(args.clip, args.dino)
    output = new_output(args.output) if args.output else None
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
