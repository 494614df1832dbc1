"""Merge a training run into one folder that transformers, vLLM and the evaluation harnesses load.

    python scripts/export.py runs/llama3-moslora --output_dir merged/llama3-moslora

Runs on a CPU with little memory: tensors are merged one by one from the base's own files.
"""

import argparse

import torch

from llava_moslora.errors import run_script
from llava_moslora.export.hf import export_hf

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the --output_dir of a training")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the written weights; default: the LLM folder's")
    parser.add_argument("--overwrite", action="store_true", help="replace --output_dir if it exists")
    args = parser.parse_args()
    folder = export_hf(args.run, args.output_dir, dtype=DTYPES.get(args.dtype), overwrite=args.overwrite)
    print(f"exported: {folder}")


if __name__ == "__main__":
    run_script(main)
