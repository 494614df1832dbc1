"""Turn a training run into the folder that the next tool loads, and prove that it answers as the run does.

    python scripts/export.py runs/llama3-moslora --output_dir merged/llama3-moslora

Runs on a CPU with little memory: tensors are merged a block of rows at a time, from the base's files into the export's.
The proof loads the export with stock libraries in a fresh process and compares it with the run, in float32; --no_proof
skips it. Several formats are written into folders of their names in --output_dir.
"""

import argparse
import sys
import textwrap

from llava_moslora.errors import run_script
from llava_moslora.export.formats import DEQUANTIZED, FORMATS, ORIGINAL
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries

DTYPES = ("bfloat16", "float16", "float32")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ScriptParser(f"{__doc__}\nformats:\n{format_list()}")
    parser.add_argument("run", help="the --output_dir of a training")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    parser.add_argument(
        "--format", nargs="+", default=["hf"], choices=list(FORMATS), metavar="FORMAT",
        help="one or several of the formats above; default: hf",
    )  # fmt: skip
    parser.add_argument("--with_base", action="store_true", help="with --format peft: peft_with_base in its place")
    parser.add_argument("--dtype", choices=DTYPES, help="of merged weights; default: the LLM folder's")
    parser.add_argument(
        "--merge_base", choices=[ORIGINAL, DEQUANTIZED], default=ORIGINAL,
        help="of a run with --bits 4: merge into the original weights, or into the dequantised ones that training saw",
    )  # fmt: skip
    parser.add_argument("--model_name_or_path", help="the LLM's folder, if it moved since the training")
    parser.add_argument("--vision_tower", help="the vision tower, if it moved since the training")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the export in --output_dir, if none of its files changed"
    )
    parser.add_argument("--no_proof", action="store_true", help="skip the proof; export_report.json records that")
    return parser.parse_args(argv)


def format_list() -> str:
    width = max(map(len, FORMATS)) + 2
    return "\n".join(
        textwrap.fill(
            summary.replace("`", ""), 100, initial_indent=f"    {name:{width}}",
            subsequent_indent=" " * (width + 4),
        )
        for name, summary in FORMATS.items()
    )  # fmt: skip


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

import torch

from llava_moslora.export.export import export


def main() -> None:
    args = parse(sys.argv[1:])
    dtype = getattr(torch, args.dtype) if args.dtype else None
    folders = export(
        args.run, args.output_dir, args.format, dtype=dtype, merge_base=args.merge_base,
        with_base=args.with_base, llm=args.model_name_or_path, vision_tower=args.vision_tower,
        overwrite=args.overwrite, prove=not args.no_proof,
    )  # fmt: skip
    for name, folder in folders.items():
        print(f"exported: {folder} ({name})")


if __name__ == "__main__":
    run_script(main)
