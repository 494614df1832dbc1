"""Check and tokenise a data file before training, and write an HTML report.

    python scripts/prepare_data.py --model_name_or_path LLM --vision_tower CLIP \\
        --data_path llava_v1_5_mix665k.json --image_folder playground/data --report_dir reports/mix665k

Training with the same settings finds the result in ``--data_cache`` by a content hash and starts at once. Without
--vision_tower the records are prepared for text-only training.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryFile

from llava_moslora.config import DataSettings, ModelSettings, Settings, setting
from llava_moslora.errors import NOT_OF_THE_PLACE, Refusal, run_script
from llava_moslora.flags import SettingsParser, flags_of
from llava_moslora.noise import quiet_libraries

MODEL_FLAGS = ("model_name_or_path", "vision_tower", "version")
# Without effect before training: how images become pixels, in which order records are seen, what is held out.
DATA_FLAGS = {f.name for f in fields(DataSettings)} - {"image_aspect_ratio", "image_engine", "data_order"}
DATA_FLAGS -= {"eval_data_path", "validation_split", "data_share"}


@dataclass
class ReportSettings(Settings):
    """The page about the data."""

    heading = "report"

    per_device_train_batch_size: int = setting(16, "records per micro-batch, for the padding statistics")
    report_dir: str | None = setting(None, "where report.html and report.json go; default: no report")


def parse(argv: list[str]) -> tuple[ModelSettings, DataSettings, ReportSettings]:
    chosen = {ModelSettings: MODEL_FLAGS, DataSettings: DATA_FLAGS, ReportSettings: None}
    groups = [flags_of(settings, names) for settings, names in chosen.items()]
    values = vars(SettingsParser([flag for flags in groups for flag in flags], __doc__).parse_args(argv))
    model, data, report = ({flag.name: values[flag.name] for flag in flags} for flags in groups)
    return ModelSettings(**model), DataSettings(**data), ReportSettings(**report)


if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:]))
    quiet_libraries()

from filelock import FileLock

from llava_moslora.data.cache import summary
from llava_moslora.data.prepare import prepare
from llava_moslora.data.report import write_report
from llava_moslora.models.llava_folder import name_parts
from llava_moslora.models.llm import check_llm_composes, longest_text, read_llm_config
from llava_moslora.models.towers import tokens_per_image
from llava_moslora.models.vision import read_vision_config
from llava_moslora.text.templates import recognise_template
from llava_moslora.text.tokenizer import load_tokenizer
from llava_moslora.training.text_only import check_flags_of_images


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
        if error.errno in NOT_OF_THE_PLACE:
            raise
        raise Refusal(
            "C-PATH", "the report cannot be written there", file=folder, key="--report_dir", found=error.strerror,
            fix="name another folder",
        ) from error  # fmt: skip


def main() -> None:
    model, data, report = parse(sys.argv[1:])
    model = name_parts(model)
    check_flags_of_images(model, data)
    if report.report_dir:
        make_report_folder(Path(report.report_dir))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    llm, limit = Path(model.model_name_or_path), None
    if (llm / "config.json").is_file():  # a tokenizer's files alone are enough here
        llm_config = read_llm_config(llm)
        check_llm_composes(llm_config, llm)
        limit = longest_text(llm_config)
    tokenizer = load_tokenizer(llm, images=not model.text_only)
    template = model.version or recognise_template(tokenizer)
    print(f"conversation template: {template}")
    dataset = prepare(
        data,
        tokenizer=tokenizer,
        template=template,
        tokens_per_image=0 if model.text_only else tokens_per_image(read_vision_config(model.tower)),
        longest_text=limit,
    )
    print(summary(dataset))
    if report.report_dir:
        with FileLock(Path(report.report_dir) / ".lock"):
            page = write_report(
                report.report_dir,
                dataset,
                settings=data,
                tokenizer=tokenizer,
                batch_size=report.per_device_train_batch_size,
                title=f"{', '.join(data.data_path)} · {template}",
            )
        print(f"report: {page}")


if __name__ == "__main__":
    run_script(main)
