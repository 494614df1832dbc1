"""ZeRO on two ranks: the losses of a plain loop, and a resume under another stage."""

import pytest

from llava_moslora.adapters.config import MosLoraConfig
from support.sdxl import IMPORTS, flags, losses, needs_diffusers, plain_losses
from support.warm_server import WarmServer
from support.zero_runs import configuration

pytestmark = [needs_diffusers, pytest.mark.slow]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def server():
    with WarmServer(modules=IMPORTS) as server:
        yield server


@pytest.fixture(scope="module")
def expected(parts, cache):
    config = MosLoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", mixer_init="orthogonal",
                           target_modules=TARGETS)  # fmt: skip
    return plain_losses(parts, cache, lambda unet: unet.add_adapter(config), steps=4)


def started(server, parts, output, stage, world=2, **changes):
    changes = {
        "deepspeed": configuration(f"zero{stage}", output.parent),
        "gradient_accumulation_steps": 4 // world,
    } | changes
    launch = server.launch(flags(parts, output, **changes), output.with_suffix(".log"), world=world,
                           main="train_sdxl:main")  # fmt: skip
    assert launch.succeeded, launch.printed()[-3000:]
    return losses(output)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_as_a_plain_loop(server, parts, tmp_path, stage, request):
    found = started(server, parts, tmp_path / "run", stage, max_steps=4)
    assert found == pytest.approx(request.getfixturevalue("expected"), rel=1e-5)


def test_a_run_goes_on_under_another_stage_and_in_sixteen_bits(server, parts, expected, tmp_path):
    """ZeRO-2 on one rank, then ZeRO-3 on two: the same losses. In bf16 they are close."""
    started(server, parts, tmp_path / "run", 2, world=1, max_steps=2)
    found = started(server, parts, tmp_path / "run", 3, max_steps=4, resume=True, allow_change="max_steps")
    assert found == pytest.approx(expected, rel=1e-5)
    rounded = started(server, parts, tmp_path / "bf16", 3, max_steps=4, bf16=True)
    assert rounded == pytest.approx(expected, rel=5e-3) and rounded != pytest.approx(expected, rel=1e-6)
    recomputed = started(server, parts, tmp_path / "full", 3, max_steps=4, recompute="full")
    assert recomputed == pytest.approx(expected, rel=1e-5)
