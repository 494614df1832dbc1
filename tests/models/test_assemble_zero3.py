"""Assembly under DeepSpeed's ZeRO-3: every part is partitioned while it is loaded, and holds the right numbers."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.internlm2_reference import write_internlm2

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, torch, deepspeed
from transformers.integrations import HfDeepSpeedConfig
from llava_moslora.config import ModelSettings
from llava_moslora.text.tokenizer import load_tokenizer
from llava_moslora.models.assemble import assemble
llm, clip, projector, tokenizer = sys.argv[1:]
tokenizer = load_tokenizer(tokenizer)

def build():
    return assemble(ModelSettings(llm, clip, projector), tokenizer=tokenizer, dtype=torch.float32)[0]

whole = {name: p.detach().clone() for name, p in build().named_parameters()}
deepspeed.init_distributed()
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
keep = HfDeepSpeedConfig({"zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "train_batch_size": 2})
model = build()
partitioned = 0
for name, p in model.named_parameters():
    if hasattr(p, "ds_id"):
        partitioned += 1
        assert p.ds_tensor.numel() < p.ds_numel or p.ds_numel == 1, name
        with deepspeed.zero.GatheredParameters([p]):
            assert torch.equal(p, whole.pop(name)), name
    else:
        assert torch.equal(p, whole.pop(name)), name
assert not whole
print("PARTITIONED", partitioned)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_internlm2_and_the_tower_are_partitioned_and_right(parts, tmp_path, tower):
    folder, _, _ = write_internlm2(tmp_path / "llm", shards=2, kind=".bin", vocab_size=320)
    text = (folder / "config.json").read_text().replace('"bos_token_id": 1,', "")
    (folder / "config.json").write_text(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # DeepSpeed compiles with ninja
    command = [sys.executable, "-c", PROGRAM, folder, vars(parts)[tower], parts.projector, parts.llm]
    ranks = [
        subprocess.Popen(
            [str(word) for word in command],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=1500)[0] for process in ranks]
    finally:
        for process in ranks:  # one that failed leaves the other waiting
            process.kill()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
        # two layers of 9 tensors, two embeddings, the last norm; the tower
        assert int(output.split("PARTITIONED")[1]) > 21 + 30
