"""``playground/swift_moslora.py`` in ms-swift, where it is installed (written for 4.6)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_moslora.adapters.load import read_adapter
from llava_moslora.export.export import export
from support.export_runs import trained_run
from support.tiny import write_clip, write_llm, write_projector

pytest.importorskip("swift.tuner_plugin", reason="ms-swift is not installed: pip install ms-swift")
PLUGIN = Path(__file__).parents[2] / "playground/swift_moslora.py"


@pytest.mark.slow
def test_swift_trains_moslora_and_resumes(tmp_path):
    llm, projector = write_llm(tmp_path / "llm"), write_projector(tmp_path / "projector.safetensors")
    trained_run(tmp_path / "run", llm, write_clip(tmp_path / "clip"), projector)
    model = export(tmp_path / "run", tmp_path / "llava", prove=False)["hf"]
    records = []
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
        turns = [("user", "<image>what colour is the shape?"), ("assistant", colour)]
        messages = [{"role": role, "content": text} for role, text in turns]
        records.append(json.dumps({"messages": messages, "images": [str(tmp_path / f"{colour}.png")]}))
    (tmp_path / "rows.jsonl").write_text("\n".join(records))
    command = f"""
        -m swift.cli.main sft --external_plugins {PLUGIN} --tuner_type moslora --model {model} --model_type llava1_5_hf
        --dataset {tmp_path}/rows.jsonl --output_dir {tmp_path}/out --add_version false --save_steps 1 --use_hf true
        --lora_rank 4 --lora_alpha 8 --target_modules all-linear --freeze_vit false --logging_steps 1
        --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --torch_dtype float32 --attn_impl eager
        --report_to none --use_cpu true --dataset_num_proc 1 --gradient_checkpointing false
        --learning_rate 1e-3 --lr_scheduler_type constant --warmup_ratio 0""".split()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    for more in (
        ["--max_steps", "1"],
        ["--max_steps", "2", "--resume_from_checkpoint", f"{tmp_path}/out/checkpoint-1"],
    ):
        done = subprocess.run([sys.executable, *command, *more], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    adapters = [read_adapter(tmp_path / f"out/checkpoint-{step}") for step in (1, 2)]  # every name and shape is checked
    assert all(layer.rank == 4 and layer.w is not None for layer in adapters[1].layers.values())
    assert len(adapters[1].layers) >= 2 * 7 + 2 * 6  # the LLM's, and the tower's layers before the last
    name = next(name for name in adapters[1].layers if "language_model" in name)
    first, second = (adapter.layers[name].w.read() for adapter in adapters)
    assert 0 < (second - first).abs().max() < 0.01  # it went on from the first
