"""Will a training run fit, how long will it take, and which flags are fastest? A plan without weights or GPU.

    python scripts/plan.py --config scripts/llama3_8b_moslora.sh --gpu h100-80 --gpus 4 --suggest
    python scripts/plan.py --config run.yaml --gpu a100-40 --gpus 8 --recompute auto
    python scripts/plan.py --config runs/llama3-moslora --gpu rtx4090

--config is a recipe, a YAML or JSON file of flags, or a run folder; flags of scripts/train_vit_llm.py go over it, or
stand alone. Only configurations are read. The lengths of records are those of the prepared data, where
scripts/prepare_data.py or a training has left them in --data_cache, else --tokens, --images and --labels of a record.

Exit status: 0 it fits, 6 it does not, 7 it may or may not, or the planner cannot tell; 2 and 3: wrong input.
docs/planning.md has the formulae.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_moslora.errors import Refusal, run_script

if __name__ == "__main__":
    run_script(lambda: None)  # a signal is one line also while the next ones are imported

from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings
from llava_moslora.devices import COMMAND_LINE
from llava_moslora.noise import quiet_libraries
from llava_moslora.planning.recipe import read_recipe
from llava_moslora.runs.paths import located_path
from llava_moslora.runs.record import BEFORE, read_run
from llava_moslora.training.command_line import accumulation_steps, parse
from llava_moslora.training.deepspeed_config import read_deepspeed_config

ROOT = Path(__file__).resolve().parents[1]
ZERO_CONFIGS = "zero_configs"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Refusal("C-FLAG", message, fix="see --help")


def own_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s --gpu GPU [--gpus N] [--config FILE] [--FLAG VALUE ...]",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", help="a recipe (.sh), a file of flags (YAML, JSON), or a run folder"
    )
    parser.add_argument("--gpu", help=" | ".join(COMMAND_LINE))
    parser.add_argument("--gpus", type=int, metavar="N", help="total number of GPUs; default: as in the recipe, else 1")
    parser.add_argument("--suggest", action="store_true", help="the fastest setting that fits, and three others")
    parser.add_argument(
        "--seen",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs on such GPUs: their first steps narrow the ranges",
    )
    parser.add_argument("--html", metavar="FILE", help="write the plan as an HTML page too")
    parser.add_argument("--json", action="store_true", help="print JSON: sizes in bytes, times in seconds")
    parser.add_argument(
        "--records", type=int, metavar="N", help="in the data set; otherwise only the step time is known"
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="of a record, image placeholders included")
    parser.add_argument("--images", type=int, metavar="N", help="of a record; default: 1 with an image folder")
    parser.add_argument("--labels", type=int, metavar="N", help="tokens of a record that are trained")
    return parser


Settings = tuple[ModelSettings, DataSettings, AdapterSettings, dict[str, Any]]  # the last: training, by name


@functools.cache
def read_command() -> tuple[argparse.Namespace, int, Settings]:
    """The planner's own flags, the number of GPUs, and the settings to plan."""
    own, flags = own_parser().parse_known_args()
    if own.gpus is not None and own.gpus < 1:
        raise Refusal("C-FLAG", "out of range", key="--gpus", found=own.gpus, expected="at least 1")
    gpus, settings = read_settings(own, flags)
    if own.gpu is None:
        raise Refusal("C-FLAG", "missing flag", key="--gpu", expected=" | ".join(COMMAND_LINE))
    return own, gpus, settings


def read_settings(own: argparse.Namespace, flags: list[str]) -> tuple[int, Settings]:
    """The number of GPUs and the settings, from ``--config`` and the flags over it."""
    config = None if own.config is None else Path(own.config)
    if config is not None and config.is_dir():
        run = read_run(config)
        record = run.located
        if flags:
            raise Refusal("C-FLAG", "a run folder is planned as it is", key="--config", found=" ".join(flags))
        given = BEFORE["training"] | {
            name: None if value == "None" else value for name, value in record.training.items()
        }  # as it is written
        training = given | {"global_batch_size": record.global_batch_size}
        if training.get("deepspeed"):
            training["deepspeed"] = located_path(training["deepspeed"], run.folder)
        data = replace(record.data, data_cache=located_path(record.data.data_cache, run.folder))
        return own.gpus or 1, (record.model, data, record.adapter, training)
    gpus, words = own.gpus, list(flags)
    if config is not None and config.suffix == ".sh":
        call = read_recipe(config, own.gpus)
        os.chdir(call.folder)  # a recipe's paths are relative to it
        gpus, words = gpus or call.gpus, [*call.flags, *flags]
    elif config is not None:
        words = ["--config", str(config), *flags]
    if "--output_dir" not in words and (config is None or config.suffix == ".sh"):
        words = ["--output_dir", "planned", *words]
    if "--data_path" not in words and config is None:
        words = ["--data_path", "unknown", *words]
    return gpus or 1, parse(words)


def zero_files() -> dict[str, dict[str, Any]]:
    """This repository's DeepSpeed files, as flags name them."""
    files = sorted((ROOT / ZERO_CONFIGS).glob("*.json"))
    return {f"{ZERO_CONFIGS}/{file.name}": read_deepspeed_config(file) for file in files}


def leave_out_compiler() -> None:
    """bitsandbytes asks for compiled functions when it is imported, and torch then imports its compiler, which takes
    seconds; a plan runs none of them. Does nothing under a torch that has no default to set."""
    with contextlib.suppress(ImportError):
        from torch.compiler import set_default_backend

        set_default_backend("eager")


if __name__ == "__main__":  # wrong flags are answered here, before the seconds that these imports take
    run_script(read_command)
    quiet_libraries()
    leave_out_compiler()

from llava_moslora.adapters.methods import check_method
from llava_moslora.files.disk import replace_file
from llava_moslora.planning.plan import make_plan
from llava_moslora.planning.plan_page import plan_page
from llava_moslora.planning.report import as_json, exit_status, text
from llava_moslora.planning.request import Asked, make_request, optimizer_of
from llava_moslora.planning.seen import PLAN, read_pair
from llava_moslora.planning.setting import Pair
from llava_moslora.training.compatible import check_method_under, check_optimizer


def main() -> None:
    own, gpus, settings = read_command()
    asked = Asked(own.gpu, gpus, own.records, own.tokens, own.images, own.labels)
    training = settings[3]
    content = None if training["deepspeed"] is None else read_deepspeed_config(training["deepspeed"])
    check_as_training(settings, content)
    request = make_request(asked, *settings[:3], training, accumulation(training, gpus), content, zero_files())
    request = replace(request, pairs=seen_pairs(own, request.device_name))
    plan = make_plan(request, with_suggestions=own.suggest)
    if own.html is not None:
        replace_file(Path(own.html), plan_page(plan, suggested=own.suggest).encode())
    print(json.dumps(as_json(plan), indent=1) if own.json else text(plan, suggested=own.suggest))
    sys.stdout.flush()
    sys.exit(exit_status(plan))


def check_as_training(settings: Settings, deepspeed: dict[str, Any] | None) -> None:
    """Refuse what training would refuse: methods and optimizers."""
    model, _, adapter, training = settings
    given: Any = SimpleNamespace(**training)
    check_method(adapter, model.bits, given)
    check_method_under(adapter, deepspeed, training["deepspeed"])
    check_optimizer(optimizer_of(training), deepspeed)


def seen_pairs(own: argparse.Namespace, device_name: str) -> tuple[Pair, ...]:
    """Of ``--seen`` and of a run folder that is planned again, as far as these were on the same kind of GPU."""
    for run in own.seen:
        if not (Path(run) / PLAN).is_file():
            fix = f"a run's folder; it has a {PLAN} after its first 20 steps"
            raise Refusal("C-PATH", "no such file", file=Path(run) / PLAN, key="--seen", fix=fix)
    planned_again = [own.config] if own.config is not None and Path(own.config).is_dir() else []
    pairs = [read_pair(Path(run)) for run in dict.fromkeys([*own.seen, *planned_again])]
    return tuple(pair for pair in pairs if pair is not None and pair.gpu == device_name)


def accumulation(training: dict[str, Any], gpus: int) -> int:
    """Micro-batches per step: as ``--global_batch_size`` asks, else as given, else 1."""
    per_device, asked = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    if per_device < 1:
        raise Refusal(
            "C-FLAG", "out of range", key="--per_device_train_batch_size", found=per_device, expected="1 or more"
        )
    if training["global_batch_size"] is None:
        return 1 if asked is None else asked
    return accumulation_steps(training["global_batch_size"], per_device, gpus)


if __name__ == "__main__":
    run_script(main)
