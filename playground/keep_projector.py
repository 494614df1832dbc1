"""Keep a stage-1 run's projector as a small folder: float16 safetensors under transformers' names.

python playground/keep_projector.py playground/runs/projector-tiny playground/projector-tiny
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava_moslora.runs.checkpoints import newest_checkpoint

README = """# projector-tiny

A two-layer MLP projector from `playground/clip-tiny` (width {width}) to SmolLM2-135M-Instruct (width {out}), pretrained
with this package's own stage 1 on captions of EasyVQA's training images. Made by `make demo-parts`; Apache-2.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    tensors = load_file(newest_checkpoint(args.run) / "projector" / "model.safetensors")
    args.output.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    save_file(halves, args.output / "model.safetensors", metadata={"format": "pt"})
    out, width = tensors["multi_modal_projector.linear_1.weight"].shape
    (args.output / "README.md").write_text(README.format(width=width, out=out), encoding="utf-8")


if __name__ == "__main__":
    main()
