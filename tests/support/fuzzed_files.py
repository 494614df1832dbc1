"""Readers of configurations, data and runs, each with files that they accept."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from llava_moslora.config import DataSettings
from llava_moslora.data.prepare import prepare
from llava_moslora.export.model_card import _loss
from llava_moslora.export.output_folder import files_of_export, open_staging, staging_of
from llava_moslora.files.manifest import MANIFEST, _own_hash, write_manifest
from llava_moslora.planning.recipe import read_recipe
from llava_moslora.planning.setting import Zero
from llava_moslora.runs.checkpoints import model_checkpoint
from llava_moslora.runs.folder import changes
from llava_moslora.runs.log import append_row, delete_rows_after, read_rows
from llava_moslora.runs.record import RUN, is_run, read_run, write_run
from llava_moslora.text.tokenizer import load_tokenizer
from llava_moslora.training import deepspeed_config
from llava_moslora.training.callbacks.sample_answers import read_samples
from llava_moslora.training.command_line import parse
from support.fuzzing import Reader
from support.launching import ROOT
from support.run_folders import save, settings
from support.tiny import write_data as write_records
from support.tokenizer_folders import TINY

ARGUMENTS = SimpleNamespace(
    deepspeed="zero.json", fp16=False, bf16=True, per_device_train_batch_size=2, gradient_accumulation_steps=1,
    world_size=1, max_grad_norm=1.0, use_cpu=True,
)  # fmt: skip
FLAGS = ["--model_name_or_path", "llm", "--vision_tower", "clip", "--data_path", "a.json", "--output_dir", "out",
         "--learning_rate", "1e-3", "--lora_r", "8", "--bf16", "True", "--num_train_epochs", "2", "--seed", "3",
         "--recompute", "selective", "--data_weights", "2", "--report_to", "none", "--save_steps", "0.5",
         "--lr_scheduler_kwargs", '{"a": 1}', "--ddp_timeout", "60", "--global_batch_size", "8"]  # fmt: skip
YAML = """# a training
model_name_or_path: llm
vision_tower: clip
data_path: [a.json, b.json]
output_dir: 2025_11_03
learning_rate: 1e-3   # of the LLM
lora_r: 8
bf16: true
warmup_steps: 0.03
image_folder: null
data_weights:
  - 1
  - 0.5
lr_scheduler_kwargs: {"min_lr": 0.1}
"""
RECIPE = """#!/usr/bin/env bash
# A recipe.
set -euo pipefail
GPUS=${GPUS:-2}
deepspeed --num_gpus "$GPUS" scripts/train_vit_llm.py \\
    --model_name_or_path llm \\
    --output_dir "runs/x"
"""


def _read_deepspeed(folder: Path) -> None:
    config = deepspeed_config.read_deepspeed_config(folder / "zero.json")
    deepspeed_config.check_deepspeed(config, ARGUMENTS)
    deepspeed_config.offloads_optimizer(config)
    Zero.of(config)


def _write_run(folder: Path) -> None:
    write_run(folder, settings())
    for step in (2, 4):
        save(folder, step, best={"step": 2, "loss": 0.5}, metrics={"loss": 0.5})


def _read_run(folder: Path) -> None:
    is_run(folder)
    record = read_run(folder)
    changes(record, settings())
    model_checkpoint(folder)
    model_checkpoint(folder, "best")


def _read_resealed(folder: Path) -> None:
    """As a version of the package with other facts would have written it."""
    file = folder / "checkpoint-4" / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        content.pop("sha256")
        file.write_text(json.dumps(content | {"sha256": _own_hash(content)}))
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        pass
    _read_run(folder)


def _write_log(folder: Path) -> None:
    for step in range(1, 6):
        append_row(folder / "metrics.jsonl", {"step": step, "loss": 0.5, "grad_norm": float("inf"), "images": ["a"]})


def _read_log(folder: Path) -> None:
    read_rows(folder / "metrics.jsonl")
    delete_rows_after(folder / "metrics.jsonl", 3)


def _write_state(folder: Path) -> None:
    log = [{"step": k, "loss": 1 / k, "learning_rate": 0.1} for k in range(1, 5)] + [{"step": 4, "train_runtime": 1.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": log}))


def _write_export(folder: Path) -> None:
    (folder / "export.json").write_text('{"run": "x"}')
    (folder / "model.safetensors").write_bytes(b"x" * 50)
    write_manifest(folder, {"format": "hf"})
    staging = staging_of(folder / "out")
    staging.mkdir()
    (staging / ".plan.json").write_text('{"format": "hf", "files": ["a"]}')


def _read_export(folder: Path) -> None:
    staging = folder / ".out.staging"
    shutil.move(staging, folder.parent / ".out.staging")
    try:
        files_of_export(folder)
        open_staging(folder.parent / "out", {"format": "hf", "files": ["a"]})
    finally:
        shutil.rmtree(folder.parent / ".out.staging")


def _prepare(folder: Path, name: str, images: bool = False) -> None:
    # RLIMIT_AS ends helper processes too; one process does the work here
    given = DataSettings([str(folder / name)], data_cache=str(folder / "cache"), preprocessing_num_workers=1,
                         image_folder=str(folder / "images") if images else None)  # fmt: skip
    tokenizer = _tokenizer(folder.parent)
    rows = prepare(given, tokenizer=tokenizer, template="chatml", tokens_per_image=4)
    assert len(rows) > 0 and rows[0]["input_ids"]


def _read_samples(folder: Path) -> None:
    given = DataSettings([str(folder / "data.json")], image_folder=str(folder / "images"))
    assert read_samples(given, tokenizer=_tokenizer(folder.parent), template="chatml", tokens_per_image=4)


_TOKENIZERS: dict = {}


def _tokenizer(folder: Path):
    if "chatml" not in _TOKENIZERS:
        _TOKENIZERS["chatml"] = load_tokenizer(TINY["chatml"](folder / "tokenizer"))
    return _TOKENIZERS["chatml"]


def _rows(folder: Path) -> list[dict]:
    write_records(folder, 6)
    return json.loads((folder / "data.json").read_text())


def _write_jsonl(folder: Path) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(folder)))


def _with_bytes(folder: Path) -> list[dict]:
    return [
        {"id": row["id"], "conversations": row["conversations"]}
        | ({"image": {"bytes": (folder / "images" / row["image"]).read_bytes(), "path": row["image"]}}
           if "image" in row else {"image": None})
        for row in _rows(folder)
    ]  # fmt: skip


def _write_parquet(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(_with_bytes(folder)), folder / "data.parquet", row_group_size=3)


def _write_saved(folder: Path) -> None:
    Dataset.from_list(_with_bytes(folder)).save_to_disk(folder / "saved")
    (arrow,) = (folder / "saved").glob("*.arrow")
    assert arrow.name == "data-00000-of-00001.arrow"


def _write_tar(folder: Path) -> None:
    rows = _rows(folder)
    with tarfile.open(folder / "data.tar", "w") as archive:
        for row in rows:
            members = {f"{row['id']}.json": json.dumps([row]).encode()}
            if "image" in row:
                members[row["image"]] = (folder / "images" / row["image"]).read_bytes()
            for name, body in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(body)
                archive.addfile(member, io.BytesIO(body))


def _write_cache(folder: Path) -> None:
    _rows(folder)
    _prepare(folder, "data.json", images=True)
    (made,) = (path for path in (folder / "cache").glob("data-*") if path.is_dir())
    made.rename(folder / "made")  # under a name that is known here
    (folder / "name").write_text(made.name)


def _read_cache(folder: Path) -> None:
    (folder / "made").rename(folder / "cache" / (folder / "name").read_text())
    _prepare(folder, "data.json", images=True)


def _flags(folder: Path) -> None:
    try:
        words = json.loads((folder / "argv.json").read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(words, list):
        words = [w if isinstance(w, str) else json.dumps(w) for w in words][:5000]
        parse([w.replace("\0", "")[:100_000] for w in words])  # as a command line can be


def _recipe(folder: Path) -> None:
    os.chdir(folder)
    read_recipe(folder / "recipe.sh", 2)


READERS = [
    Reader("--config YAML", {"run.yaml": "text"}, lambda f: (f / "run.yaml").write_text(YAML),
           lambda f: parse(["--config", str(f / "run.yaml")])),
    Reader("--config JSON", {"run.json": "json"},
           lambda f: (f / "run.json").write_text(json.dumps(
               {"model_name_or_path": "llm", "vision_tower": "clip", "data_path": ["a"], "output_dir": "o", "lora_r": 4,
                "bf16": True, "lr_scheduler_kwargs": {"a": [1, {"b": None}]}})),
           lambda f: parse(["--config", str(f / "run.json")])),
    Reader("flags", {"argv.json": "json"}, lambda f: (f / "argv.json").write_text(json.dumps(FLAGS)), _flags),
    Reader("DeepSpeed JSON", {"zero.json": "json"},
           lambda f: shutil.copy(ROOT / "zero_configs" / "zero3_offload.json", f / "zero.json"), _read_deepspeed),
    Reader("recipe", {"recipe.sh": "text"}, lambda f: (f / "recipe.sh").write_text(RECIPE), _recipe),
    Reader("run.json", {RUN: "json"}, _write_run, _read_run),
    Reader("MANIFEST.json", {"checkpoint-4/MANIFEST.json": "json"}, _write_run, _read_run),
    Reader("MANIFEST.json, resealed", {"checkpoint-4/MANIFEST.json": "json"}, _write_run, _read_resealed),
    Reader("metrics.jsonl", {"metrics.jsonl": "jsonl"}, _write_log, _read_log),
    Reader("trainer_state.json", {"trainer_state.json": "json"}, _write_state,
           lambda f: _loss(SimpleNamespace(checkpoint=f, manifest={}))),
    Reader("MANIFEST.json of an export", {"MANIFEST.json": "json", ".out.staging/.plan.json": "json"}, _write_export,
           _read_export),
    Reader("records JSON", {"data.json": "json"}, _rows, partial(_prepare, name="data.json", images=True)),
    Reader("records JSONL", {"data.jsonl": "jsonl"}, _write_jsonl, partial(_prepare, name="data.jsonl", images=True)),
    Reader("records Parquet", {"data.parquet": "bytes"}, _write_parquet, partial(_prepare, name="data.parquet")),
    Reader("tar shard", {"data.tar": "tar"}, _write_tar, partial(_prepare, name="data.tar")),
    Reader("saved data set", {"saved/state.json": "json", "saved/dataset_info.json": "json",
                              "saved/data-00000-of-00001.arrow": "bytes"},
           _write_saved, partial(_prepare, name="saved")),
    Reader("data cache", {"made/report.json": "json", "made/000000.arrow": "bytes", "made/000000.json": "json"},
           _write_cache, _read_cache),
    Reader("sample questions", {"data.json": "json"}, _rows, _read_samples),
]  # fmt: skip
