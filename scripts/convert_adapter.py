"""Convert an adapter of this or another tool to this package's training form, or to a plain LoRA for stock PEFT.

    python scripts/convert_adapter.py adapters/moslora --output_dir adapters/plain --format lora
    python scripts/convert_adapter.py iter_2181.pth --output_dir adapters/ours \\
        --lora_alpha llm.=128 visual_encoder.=16 \\
        --rename llm.model.=model.language_model. visual_encoder.vision_model.=model.vision_tower.

It reads adapters of this package, of the MoSLoRA authors' repository and their fork of PEFT, XTuner's iter_N.pth and
plain LoRAs. A plain LoRA becomes a MoSLoRA adapter with identity mixers, from which training can continue. No base
model is needed, and the result is equivalent to the source.
"""

import argparse
import sys
from pathlib import Path

from llava_moslora.errors import Refusal, few, run_script
from llava_moslora.flags import ScriptParser
from llava_moslora.noise import quiet_libraries


def parse(argv: list[str]) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("adapter", type=Path, help="an adapter folder, or a weight file (XTuner's iter_N.pth)")
    parser.add_argument(
        "--output_dir", type=Path, required=True, metavar="FOLDER", help="the folder to write; it must not exist"
    )
    parser.add_argument(
        "--format",
        choices=("moslora", "lora"),
        default="moslora",
        help="moslora (default): A, W and B, to continue training or to load with this package; "
        "lora: W·A and B, for stock PEFT",
    )
    parser.add_argument(
        "--rename",
        nargs="+",
        default=[],
        metavar="OLD=NEW",
        help="prefixes of module names in the source, and what replaces them; the longest match counts",
    )
    parser.add_argument(
        "--lora_alpha",
        nargs="+",
        default=[],
        metavar="ALPHA",
        help="for a file without adapter_config.json: the alpha used in training, or PREFIX=ALPHA for each part",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

from llava_moslora.adapters.fold import Adapter, LowRank, fold, rename_adapter, replace_prefix, save
from llava_moslora.adapters.load import read_adapter
from llava_moslora.files.disk import new_folder


def main() -> None:
    args = parse(sys.argv[1:])
    convert(args.adapter, args.output_dir, args.format, args.rename, args.lora_alpha)


def convert(source: Path, output: Path, form: str, rename: list[str], lora_alpha: list[str]) -> None:
    """
    Raises:
        Refusal: C-OUTPUT, ``output`` exists; C-FLAG, a flag that cannot be read or has no effect; K-ADAPTER, as
            :func:`llava_moslora.adapters.load.read_adapter`.
    """
    if output.exists():
        raise Refusal("C-OUTPUT", "already exists", file=output, key="--output_dir", fix="choose another, or delete it")
    if lora_alpha and source.is_dir():
        what, fix = "the folder's adapter_config.json has it", "omit it"
        raise Refusal("C-FLAG", what, file=source, key="--lora_alpha", found=" ".join(lora_alpha), fix=fix)
    prefixes, alphas = _renames(rename), _alphas(lora_alpha)
    adapter = read_adapter(source, lora_alpha=alphas)
    names = [*adapter.layers, *adapter.others]
    for key, given in (("--rename", prefixes), ("--lora_alpha", alphas)):
        if unused := [prefix for prefix in given if not any(name.startswith(prefix) for name in names)]:
            what, fix = "no name in the adapter begins with it", "use a prefix of these names"
            raise Refusal("C-FLAG", what, file=source, key=key, found=unused[0], expected=few(names), fix=fix)
    if source.is_file() and adapter.others:  # XTuner saves the whole training state in one file
        print(f"not written: {few(adapter.others)}, which do not belong to the adapter")
        adapter = Adapter(adapter.config, adapter.layers, {})
    if prefixes:
        adapter = rename_adapter(adapter, lambda name: replace_prefix(name, prefixes))
    with new_folder(output) as staging:
        save(fold(adapter) if form == "lora" else adapter, staging)
    ranks = sorted({layer.rank for layer in adapter.layers.values() if isinstance(layer, LowRank)})
    of_rank = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
    print(f"converted: {output}, {len(adapter.layers)} layers{of_rank}")


def _renames(words: list[str]) -> dict[str, str]:
    renames = {}
    for word in words:
        old, equals, renames[old] = word.partition("=")
        if not equals:
            raise Refusal("C-FLAG", "no = in it", key="--rename", found=word, expected="OLD=NEW")
    return renames


def _alphas(words: list[str]) -> dict[str, float]:
    """Prefix of names → alpha; a number alone is for all names."""
    alphas = {}
    for word in words:
        prefix, _, number = word.rpartition("=")
        try:
            alphas[prefix] = int(number) if number.isdigit() else float(number)
        except ValueError:
            expected = "a number, or PREFIX=NUMBER"
            raise Refusal("C-FLAG", "not a number", key="--lora_alpha", found=word, expected=expected) from None
    return alphas


if __name__ == "__main__":
    run_script(main)
