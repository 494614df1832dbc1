"""ZeRO-2 and ZeRO-3 over two processes, every parameter really partitioned, against one process without DeepSpeed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from llava_moslora.adapters.config import MosLoraConfig
from support.adapter_models import LINEARS, llama, relative

ROOT = Path(__file__).parents[2]
STEPS, ROWS = 4, 4

SCRIPT = """
import sys, torch, deepspeed
from support.adapter_models import llama
from adapters.test_deepspeed import STEPS, adapter, batch

stage, folder = int(sys.argv[-2]), sys.argv[-1]
deepspeed.init_distributed()
rank = torch.distributed.get_rank()
model = adapter(llama())
trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
engine, *_ = deepspeed.initialize(model=model, model_parameters=list(trained.values()), config={
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0, "torch_adam": True}},
    "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
})
if stage == 3:
    assert all(p.numel() == 0 for p in model.parameters()), "a parameter is not partitioned"
for step in range(STEPS):
    ids = batch(step)[2 * rank : 2 * rank + 2]
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
with deepspeed.zero.GatheredParameters(list(trained.values())):
    if rank == 0:
        torch.save({n: p.detach().clone() for n, p in trained.items()}, folder + "/trained.pt")
"""


def adapter(model):
    """Dropout would draw from a stream per process; everything else is on, activation checkpointing too."""
    torch.manual_seed(1)
    config = MosLoraConfig(r=4, target_modules=LINEARS, mixer_init="orthogonal", init_lora_weights=False)
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})
    model.enable_input_require_grads()
    return model.train()


def batch(step):
    return torch.randint(1, 97, (ROWS, 24), generator=torch.Generator().manual_seed(step))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage, tmp_path):
    pytest.importorskip("deepspeed")
    model = adapter(llama())
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(STEPS):
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    # The launcher starts `python` by name, and DeepSpeed compiles with the ninja next to it.
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(stage), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "PATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trained = torch.load(tmp_path / "trained.pt", weights_only=True)
    assert trained.keys() == expected.keys() and any("lora_mixer" in name for name in trained)
    for name, tensor in trained.items():
        moved = expected[name] - start[name]
        assert relative(tensor - start[name], moved) <= 1e-3, name  # Adam divides by the root of tiny squares
