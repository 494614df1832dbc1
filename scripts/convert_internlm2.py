"""Convert an InternLM2 folder to a Llama folder once, on disk, shard by shard.

    python scripts/convert_internlm2.py models/internlm2-chat-7b --output_dir models/internlm2-chat-7b-llama

Training, export and evaluation read InternLM2 folders directly. This is for other tools, which then do not need the
model's custom code. One shard is in memory at a time; the folder is written atomically.
"""

import argparse
import sys
from pathlib import Path

from llava_moslora.errors import Refusal, run_script
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("folder", type=Path, help="the downloaded InternLM2")
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="the folder to write; it must not exist"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig

from llava_moslora.files.disk import new_folder, read_json, write_json
from llava_moslora.files.tensors import read_tensor_folder, save_tensors
from llava_moslora.models.internlm2 import MODEL_TYPE, llama_tensors
from llava_moslora.models.llm import read_llm_config, read_llm_tensors, with_old_rope
from llava_moslora.text.tokenizer import load_tokenizer


def main() -> None:
    args = parse(sys.argv[1:])
    convert(args.folder, args.output_dir)
    print(f"converted: {args.output_dir}")


def convert(folder: Path, output: Path) -> None:
    config = read_llm_config(folder)
    if (found := read_json(folder / "config.json").get("model_type")) != MODEL_TYPE:
        what, fix = "not an InternLM2", "use it as --model_name_or_path: no conversion is needed"
        raise Refusal("C-MODEL", what, file=folder, key="model_type", found=found, expected=MODEL_TYPE, fix=fix)
    if output.exists():
        raise Refusal("C-OUTPUT", "already exists", file=output, key="--output_dir", fix="choose another, or delete it")
    read_llm_tensors(folder, config)  # refuses what is not exactly the architecture, before anything is written
    tokenizer = load_tokenizer(folder)

    with new_folder(output) as staging:
        _write(staging, folder, config)
        tokenizer.save_pretrained(staging)


def _write(staging: Path, folder: Path, config: LlamaConfig) -> None:
    """Weights and configurations, shard by shard."""
    shards: dict[Path, dict] = {}
    for name, stored in read_tensor_folder(folder).items():
        shards.setdefault(stored.file, {})[name] = stored
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(tqdm(shards.values(), unit="shard", dynamic_ncols=True), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        renamed = {n: s for n, s in llama_tensors(shard, config).items() if not n.endswith(".inv_freq")}
        tensors = {name: stored.read().contiguous() for name, stored in renamed.items()}
        save_tensors(tensors, staging / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(staging / "model.safetensors.index.json", index)
    write_json(staging / "config.json", with_old_rope(config.to_diff_dict()))
    if (folder / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folder).save_pretrained(staging)


if __name__ == "__main__":
    run_script(main)
