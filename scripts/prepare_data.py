"""Check and tokenise a data file before training, and write a page about it.

    python scripts/prepare_data.py --model_name_or_path LLM --vision_tower CLIP \\
        --data_path llava_v1_5_mix665k.json --image_folder playground/data --report_dir reports/mix665k

Training with the same settings finds the result in ``--data_cache`` by its content and starts at once.
"""

import argparse
import logging
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryFile

from llava_moslora.config import DATA_GROUP, DataSettings
from llava_moslora.data.prepare import prepare, report_of
from llava_moslora.data.report import write_report
from llava_moslora.errors import Refusal, run_script
from llava_moslora.models.assemble import tokens_per_image
from llava_moslora.models.llm import longest_text, read_llm_config
from llava_moslora.models.vision import read_vision_config
from llava_moslora.text.conversation import recognise_template
from llava_moslora.text.tokenizer import load_tokenizer


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Refusal("C-FLAG", message, fix="see --help")


def truth(text: str) -> bool:
    """As training's flags are written: ``True`` or ``False``."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")
    return text.lower() == "true"


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder of the LLM: its tokenizer is used")
    parser.add_argument("--vision_tower", required=True, help="folder of the vision tower: tokens per image")
    parser.add_argument("--data_path", required=True, nargs="+", help="LLaVA-format JSON, JSONL, Parquet, or shards")
    parser.add_argument("--data_weights", type=float, nargs="+", help="how often each of several is seen in an epoch")
    parser.add_argument("--image_folder", help="folder that the records' image names are relative to")
    parser.add_argument("--version", help="conversation template; default: told by the tokenizer")
    parser.add_argument("--model_max_length", type=int, default=2048, help="tokens per record, placeholders included")
    parser.add_argument("--data_cache", default=".cache/llava_moslora", help="folder of the tokenised data")
    parser.add_argument("--preprocessing_num_workers", type=int, default=1, help="processes that tokenise")
    parser.add_argument("--on_bad_record", default="fail", help="fail, or quarantine: leave bad records out, listed")
    parser.add_argument("--max_bad_share", type=float, default=0.01, help="quarantine at most this share")
    parser.add_argument("--follow_image_links", default=False, type=truth, help="allow links out of the image folder")
    parser.add_argument("--decode_images", default=False, type=truth, help="decode every image, not its header only")
    parser.add_argument("--data_group", type=int, default=DATA_GROUP, help="for the padding figures, as in training")
    parser.add_argument("--per_device_train_batch_size", type=int, default=16, help="for the padding figures")
    parser.add_argument("--report_dir", help="where report.html and report.json go; default: no report")
    return parser.parse_args()


def make_report_folder(folder: Path) -> None:
    """Before the work, not after it.

    Raises:
        Refusal: C-PATH, no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = {"file": folder, "key": "--report_dir", "found": error.strerror}
        raise Refusal("C-PATH", "the report cannot be written there", **where, fix="name another folder") from error


def main() -> None:
    args = parse()
    names = [f.name for f in fields(DataSettings) if getattr(args, f.name, None) is not None]
    settings = DataSettings(**{name: getattr(args, name) for name in names})
    if args.report_dir:
        make_report_folder(Path(args.report_dir))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    llm = Path(args.model_name_or_path)  # a tokenizer's files alone are enough here
    tokenizer = load_tokenizer(llm)
    template = args.version or recognise_template(tokenizer)
    print(f"conversation template: {template}")
    dataset = prepare(
        settings,
        tokenizer=tokenizer,
        template=template,
        tokens_per_image=tokens_per_image(read_vision_config(args.vision_tower)),
        longest_text=longest_text(read_llm_config(llm)) if (llm / "config.json").is_file() else None,
    )
    counts = {name: value for name, value in report_of(dataset).items() if isinstance(value, int)}
    print("  ".join(f"{name}: {value:,}" for name, value in counts.items()))
    if args.report_dir:
        page = write_report(
            args.report_dir,
            dataset,
            settings=settings,
            tokenizer=tokenizer,
            batch_size=args.per_device_train_batch_size,
            title=f"{', '.join(args.data_path)} · {template}",
        )
        print(f"report: {page}")


if __name__ == "__main__":
    run_script(main)
