"""Turn a training run into the folder that the next tool loads, and prove that it answers as the run does.

    python scripts/export.py runs/llama3-moslora --output_dir merged/llama3-moslora

Runs on a CPU with little memory: tensors are merged row block by row block, from the base's own files into the
export's. The proof then computes the whole model in float32; --no_proof leaves it out. Formats:

    hf               merged LlavaForConditionalGeneration: transformers, vLLM, lmms-eval, llama.cpp's converters
    peft             plain LoRA adapters for stock PEFT, over the original LLM and tower, and the projector;
                     --with_base: one adapter over a complete base LLaVA that is written beside it
    xtuner           llm/ visual_encoder/ projector/, merged, as VLMEvalKit's LLaVA_XTuner takes them
    xtuner_adapters  llm_adapter/ visual_encoder_adapter/ projector/, the same unmerged
    llava            the original LLaVA's LlavaLlamaForCausalLM
    llm, vision, projector   each part as a folder of its own kind

Several formats go into folders of their names in --output_dir.
"""

import argparse

import torch

from llava_moslora.errors import run_script
from llava_moslora.export.export import TARGETS, export
from llava_moslora.export.trained_run import DEQUANTIZED, ORIGINAL

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the --output_dir of a training")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    parser.add_argument("--format", nargs="+", default=["hf"], choices=list(TARGETS), metavar="FORMAT", help="above")
    parser.add_argument("--with_base", action="store_true", help="of peft: one adapter over a base LLaVA beside it")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of merged weights; default: the LLM folder's")
    parser.add_argument(
        "--merge_base", choices=[ORIGINAL, DEQUANTIZED], default=ORIGINAL,
        help="of a run with --bits 4: merge into the original weights, or into the dequantised ones, as training saw",
    )  # fmt: skip
    parser.add_argument("--model_name_or_path", help="the LLM's folder, if it moved since the training")
    parser.add_argument("--vision_tower", help="the vision tower, if it moved since the training")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an export, as it was written, in --output_dir"
    )
    parser.add_argument("--no_proof", action="store_true", help="do not reopen and compare; the report will say so")
    args = parser.parse_args()
    folders = export(
        args.run,
        args.output_dir,
        args.format,
        dtype=DTYPES.get(args.dtype),
        merge_base=args.merge_base,
        with_base=args.with_base,
        llm=args.model_name_or_path,
        vision_tower=args.vision_tower,
        overwrite=args.overwrite,
        prove=not args.no_proof,
    )
    for name, folder in folders.items():
        print(f"exported: {folder} ({name})")


if __name__ == "__main__":
    run_script(main)
