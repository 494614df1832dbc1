"""Hooks for :mod:`support.warm_server` that break what the fault tests guard: a test that passes then is no test."""

from __future__ import annotations

from pathlib import Path

import torch

from llava_moslora.data import sampler
from llava_moslora.files import manifest
from llava_moslora.runs import folder as run_folder
from llava_moslora.runs.checkpoints import checkpoints
from llava_moslora.training import trainer


def save_in_place() -> None:
    """Checkpoints are written where they will be read, and the newest is taken unseen: the stock way."""

    def publish_in_place(target: Path, write, facts) -> None:
        target.mkdir(parents=True, exist_ok=True)
        manifest.write_json(target / manifest.MANIFEST, {"schema": manifest.SCHEMA, **facts(), "files": {}})
        write(target)

    trainer.publish_checkpoint = publish_in_place
    run_folder.newest_valid = lambda run: (next(iter(checkpoints(run)), None), [])
    run_folder.read_facts = lambda folder: manifest.json.loads((folder / manifest.MANIFEST).read_text())


def draw_the_order_from_the_global_stream() -> None:
    """As LLaVA's sampler, which has no generator of its own."""

    def epoch_order(self):
        return torch.randperm(len(self.lengths)).numpy()

    sampler.GlobalBatchSampler.epoch_order = epoch_order


def manifest_without_hashes() -> None:
    """A manifest that lists names and sizes."""
    manifest.sha256 = lambda path: "unknown"
    manifest._own_hash = lambda content: "unknown"
