"""Export a training run to a format that other tools load, and verify that it gives the run's answers.

    python scripts/export.py runs/llama3-moslora --output_dir merged/llama3-moslora

Runs on a CPU with little memory: tensors are merged a block of rows at a time, from the base's files into the export's.
Verification loads the export with stock libraries in a fresh process and compares it with the run, in float32;
--no_proof skips it. Several formats are written into folders of their names in --output_dir.

    python scripts/export.py merged/llama3-moslora --push_to_hub OWNER/NAME

uploads a finished export; with a run and --output_dir too, the export that was just written.
"""

import argparse
import sys
import textwrap
from pathlib import Path

from llava_moslora.errors import Refusal, run_script
from llava_moslora.export.formats import DEQUANTIZED, DIFFUSERS, FORMATS, ORIGINAL, SDXL_FORMATS
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries

DTYPES = ("bfloat16", "float16", "float32")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ScriptParser(f"{__doc__}\nformats:\n{format_list()}")
    parser.add_argument("run", help="the --output_dir of a training run; with only --push_to_hub, a finished export")
    parser.add_argument("--output_dir", metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--format", nargs="+", default=["hf"], choices=[*FORMATS, *SDXL_FORMATS], metavar="FORMAT",
        help="one or several of the formats above; default: hf",
    )  # fmt: skip
    parser.add_argument("--with_base", action="store_true", help="with --format peft: peft_with_base instead")
    parser.add_argument("--dtype", choices=DTYPES, help="of merged weights; default: the LLM folder's")
    parser.add_argument(
        "--merge_base", choices=[ORIGINAL, DEQUANTIZED], default=ORIGINAL,
        help="with --bits 4: merge into the original weights (default), or the dequantised ones used in training",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", metavar="WHICH",
        help="best (by validation), newest, or a step; default: newest, of a run with --load_best_model_at_end best",
    )  # fmt: skip
    parser.add_argument("--kohya", action="store_true", help="with --format diffusers: also kohya.safetensors")
    parser.add_argument(
        "--model_name_or_path", metavar="FOLDER", help="the LLM's or the SDXL's folder, if it moved since the training"
    )
    parser.add_argument("--vision_tower", metavar="PLACE", help="the vision tower, if it moved since the training")
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace the export in --output_dir, if none of its files changed; and write to a repository of the Hub "
        "that holds something else or was changed there, whose earlier commits stay",
    )  # fmt: skip
    parser.add_argument("--no_proof", action="store_true", help="skip verification; export_report.json records that")
    parser.add_argument(
        "--evaluation", metavar="RESULTS", help="the --output of scripts/evaluate.py: scores for the model card"
    )
    parser.add_argument(
        "--push_to_hub", metavar="OWNER/NAME",
        help="upload the export to this repository of the Hugging Face Hub, which is created",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", help="with --push_to_hub: visible only to its owner")
    args = parser.parse_args(argv)
    check_flags(args, parser)
    return args


def check_flags(args: argparse.Namespace, parser: ScriptParser) -> None:
    if args.private and args.push_to_hub is None:
        raise Refusal("C-FLAG", "needs --push_to_hub", key="--private")
    if args.push_to_hub is not None and len(args.format) > 1:
        fix = "one --format, or push their folders one by one"
        raise Refusal("C-FLAG", "a repository holds one format", key="--format", found=", ".join(args.format), fix=fix)
    check_sdxl_flags(args, parser)
    if args.output_dir is not None:
        return
    if args.push_to_hub is None:
        raise Refusal("C-FLAG", "missing", key="--output_dir", fix="name the folder to write")
    pushing = ("run", "output_dir", "push_to_hub", "private", "overwrite")
    values = {name: value for name, value in vars(args).items() if name not in pushing}
    if given := [name for name, value in values.items() if value != parser.get_default(name)]:
        what = "belongs to an export, and a finished one is pushed as it is"
        raise Refusal("C-FLAG", what, key=f"--{given[0]}", fix="omit it, or give a run and --output_dir")


def check_sdxl_flags(args: argparse.Namespace, parser: ScriptParser) -> None:
    if DIFFUSERS not in args.format:
        if args.kohya:
            raise Refusal("C-FLAG", f"belongs to --format {DIFFUSERS}", key="--kohya")
        return
    if len(args.format) > 1:
        fix, found = f"--format {DIFFUSERS} alone", ", ".join(args.format)
        raise Refusal("C-FLAG", "a run is either of SDXL or not", key="--format", found=found, fix=fix)
    others = ("with_base", "dtype", "merge_base", "vision_tower", "evaluation")
    if given := [name for name in others if getattr(args, name) != parser.get_default(name)]:
        raise Refusal("C-FLAG", f"no effect with --format {DIFFUSERS}", key=f"--{given[0]}", fix="omit it")


def format_list() -> str:
    formats = FORMATS | SDXL_FORMATS
    width = max(map(len, formats)) + 2
    return "\n".join(
        textwrap.fill(
            summary.replace("`", ""), 100, initial_indent=f"    {name:{width}}",
            subsequent_indent=" " * (width + 4),
        )
        for name, summary in formats.items()
    )  # fmt: skip


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

import torch

from llava_moslora.diffusion.export import export_lora
from llava_moslora.export.export import export
from llava_moslora.export.sharing import check_repository, files_to_push, push


def main() -> None:
    args = parse(sys.argv[1:])
    repository = {"private": args.private, "overwrite": args.overwrite}
    if args.output_dir is None:
        files_to_push(Path(args.run))
    if args.push_to_hub is not None:
        check_repository(args.push_to_hub, **repository)
    folder = Path(args.run) if args.output_dir is None else export_run(args)
    if args.push_to_hub is not None:
        print(f"pushed: {push(folder, args.push_to_hub, **repository)}")


def export_run(args: argparse.Namespace) -> Path:
    """Returns the folder of the last format."""
    if args.format == [DIFFUSERS]:
        folder = export_lora(
            args.run, args.output_dir, base=args.model_name_or_path, checkpoint=args.checkpoint, kohya=args.kohya,
            overwrite=args.overwrite, prove=not args.no_proof,
        )  # fmt: skip
        print(f"exported: {folder} ({DIFFUSERS})", flush=True)
        return folder
    dtype = getattr(torch, args.dtype) if args.dtype else None
    folders = export(
        args.run, args.output_dir, args.format, dtype=dtype, merge_base=args.merge_base,
        with_base=args.with_base, checkpoint=args.checkpoint, llm=args.model_name_or_path,
        vision_tower=args.vision_tower, evaluation=args.evaluation, overwrite=args.overwrite, prove=not args.no_proof,
    )  # fmt: skip
    for name, folder in folders.items():
        print(f"exported: {folder} ({name})", flush=True)
    return folder


if __name__ == "__main__":
    run_script(main)
