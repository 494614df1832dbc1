"""The plan's weights, masters and moments on each rank against those of DeepSpeed's real engines on two ranks."""

import json

import pytest

from llava_moslora.config import AdapterSettings
from llava_moslora.models.llm import read_llm_config
from llava_moslora.models.vision import read_vision_config
from llava_moslora.planning.setting import Model, Zero
from llava_moslora.planning.states import count, states
from llava_moslora.text.tokenizer import load_tokenizer
from support.zero_runs import configuration, run_successfully, settings

pytestmark = pytest.mark.slow
RANKS, ALIGNED = 2, 4  # numbers to which DeepSpeed fills up a rank's part of a flat group
NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_has_what_is_planned(warm_server, parts, tmp_path, name, bits):
    file = configuration(name, tmp_path)
    changes = {"bf16": True, "deepspeed": file, "max_steps": 1, "save_strategy": "no", "bits": bits, "save_steps": 1}
    arguments = settings(parts, tmp_path / "run", **changes, data_cache=tmp_path / "cache")
    hooks = [["support.partitions:count_after_training", {"folder": str(tmp_path)}]]
    run_successfully(warm_server, arguments, tmp_path / "launch", world=RANKS, hooks=hooks, limit=300)

    config = read_llm_config(parts.llm)
    config.vocab_size = max(config.vocab_size, len(load_tokenizer(parts.llm)))
    adapter = AdapterSettings(lora_r=4, vision_lora_r=3)
    zero = Zero.of(json.loads(file.read_text()))
    counts = count(Model(config, read_vision_config(parts.clip), adapter, bits=bits))
    plan = states(counts, zero, RANKS)
    for rank in range(RANKS):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        filled = seen["tensors"] if zero.stage == 3 else ALIGNED * len(NAMES)  # numbers; stage 3 fills up every tensor
        masters = 4 * counts.trained // (RANKS if zero.stage else 1)
        assert masters <= seen["masters"] <= masters + 4 * filled
        assert 2 * masters <= seen["moments"] <= 2 * masters + 8 * filled
        if zero.offload_optimizer:
            assert plan.masters == plan.moments == 0
            assert plan.host >= seen["masters"] + seen["moments"] - 12 * filled
        else:
            assert (plan.masters, plan.moments) == (masters, 2 * masters)
        if not zero.offload_parameters and bits == 16:
            assert plan.frozen <= seen["frozen"] <= plan.frozen + 2 * len(counts.sizes)
            assert plan.trained <= seen["trained"] <= plan.trained + 2 * filled
