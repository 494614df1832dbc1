"""Runs under every file of ``zero_configs/``, in processes that :mod:`support.warm_server` starts."""

import json
from pathlib import Path

from support.launching import ROOT, flags
from support.warm_server import Launch, WarmServer

STEPS = 24


def configuration(name: str, folder: Path) -> Path:
    """A file of zero_configs/, with buckets for tiny models and every parameter really partitioned."""
    config = json.loads((ROOT / "zero_configs" / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    zero["reduce_bucket_size"] = 5e5
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    (folder / f"{name}.json").write_text(json.dumps(config))
    return folder / f"{name}.json"


def settings(parts, run: Path, **changes) -> list[str]:
    """Every third record is text only, in random order: ranks meet batches with and without images."""
    same = {"max_steps": STEPS, "save_steps": STEPS, "data_order": "shuffle", "vision_lora_r": 3, "report_to": "none"}
    same |= {"dataloader_num_workers": 0}
    return flags(parts, run, **(same | changes))


def run_successfully(warm_server: WarmServer, arguments: list[str], output: Path, **how) -> Launch:
    launch = warm_server.launch(arguments, output, **how)
    how_it_ended = f"status {launch.status}{', stopped at its time limit' if launch.stuck else ''}"
    assert launch.succeeded, f"{how_it_ended}\n{launch.printed()[-3000:]}"
    return launch
