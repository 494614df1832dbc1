"""What an optimizer keeps is saved and put back bit for bit, whichever it is and wherever DeepSpeed keeps it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer
from transformers import TrainingArguments as HfTrainingArguments

from llava_moslora.training.checkpoint import read_optimizer, write_optimizer
from llava_moslora.training.compatible import PER_PARAMETER, PER_WEIGHT
from llava_moslora.training.optimizer_state import TrainState
from support.launching import ROOT, free_port, run

STEPS = 6
# Every stage with an optimizer of each kind that it can save; (stage, --optim, steps before the save)
IN_DEEPSPEED = [
    *((0, name, 3) for name in ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor")),
    *((0, name, 3) for name in ("ademamix_8bit", "paged_adamw_32bit", "sgd", "rmsprop_bnb_8bit")),
    *((stage, name, 3) for stage in (1, 2, 3) for name in PER_WEIGHT),
    *((stage, "adamw_torch_fused", 0) for stage in (0, 1, 2, 3)),
    *(("1 with float32 gradients", "adamw_torch_fused", stop) for stop in (0, 3)),  # DeepSpeed's BF16_Optimizer
    # DeepSpeed's Adam on the CPU: 0.999³ as a product in float32 is another number than by pow
    *((f"{stage}, offloaded", "adamw_torch_fused", stop) for stage in (2, 3) for stop in (0, 2, 5)),
]
FEW = 4  # tensor operations a parameter and step


class Net(nn.Module):
    """A weight large enough for 8-bit state (4096 numbers), small ones, and one that is used from the third step on."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.wide, self.narrow, self.late = nn.Linear(32, 160), nn.Linear(160, 8), nn.Linear(32, 8)

    def forward(self, x, late=True):
        y = self.narrow(torch.tanh(self.wide(x)))
        return (y + self.late(x) if late else y).float().square().mean()


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """As the Trainer makes it, with two groups."""
    args = HfTrainingArguments(output_dir="unused", optim=name, report_to=[], use_cpu=not torch.cuda.is_available())
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = [[p for p in model.parameters() if p.dim() == dim] for dim in (2, 1)]
    groups = [{"params": p, "lr": 1e-2, "weight_decay": decay} for p, decay in zip(groups, (0.1, 0.0), strict=True)]
    return kind(groups, **settings)


class Plain:
    """A run without DeepSpeed."""

    def __init__(self, name: str, seed: int):
        self.model = Net(seed)
        self.optimizer = optimizer_of(name, self.model)
        self.train_state = TrainState(self.model, self.optimizer)

    def train(self, steps: range) -> None:
        for step in steps:
            self.model(batch(step), late=step >= 2).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


class InDeepSpeed:
    """A run in bf16 in an engine of one rank."""

    def __init__(self, name: str, seed: int, stage: int):
        import deepspeed

        zero = {"stage": int(str(stage)[0])} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": zero}
        if stage == "1 with float32 gradients":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        config |= {"gradient_clipping": 1.0, "zero_allow_untested_optimizer": True}
        self.model = Net(seed).bfloat16()
        optimizer = optimizer_of(name, self.model)
        if "offloaded" in str(stage):
            from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            optimizer = map_pytorch_optim_to_deepspeed(optimizer)  # as the Trainer does
        self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        self.train_state = TrainState(self.model, optimizer, self.engine)
        self.train_state.undo_initial_step()

    def train(self, steps: range) -> None:
        for step in steps:
            self.engine.backward(self.engine(batch(step).bfloat16()))
            self.engine.step()


def batch(step: int) -> torch.Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(step))


def check_resumes(start, folder: Path, stop: int) -> None:
    """A run that was saved at a step and loaded into another process' objects continues as the uninterrupted one."""
    whole, again = start(seed=0), start(seed=1)
    whole.train(range(stop))
    masters, state = whole.train_state.masters(), whole.train_state.optimizer_state()
    write_optimizer(folder, whole.model, state, {})
    assert whole.train_state.masters(keep=False) == whole.train_state.optimizer_state(keep=False) == {}
    again.train_state.create_optimizer_state()
    read, _ = read_optimizer(folder, again.train_state.optimizer_state())
    again.train_state.restore(masters, read, None)
    same_state(whole.train_state, again.train_state)
    whole.train(range(stop, STEPS))
    again.train(range(stop, STEPS))
    same_state(whole.train_state, again.train_state)
    assert any(not torch.equal(masters[name], tensor) for name, tensor in again.train_state.masters().items())


def same_state(one: TrainState, other: TrainState) -> None:
    for found, expected in ((other.masters(), one.masters()), (other.optimizer_state(), one.optimizer_state())):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("name", PER_WEIGHT + PER_PARAMETER)
def test_without_deepspeed(tmp_path, name, stop):
    if "bit" in name or "bnb" in name or "ademamix" in name:
        pytest.importorskip("bitsandbytes")
    check_resumes(lambda seed: Plain(name, seed), tmp_path, stop)


def test_eight_bits_are_kept_in_eight_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    plain = Plain("adamw_bnb_8bit", 0)
    plain.train(range(3))
    state = plain.train_state.optimizer_state()
    assert state["wide.weight.state1"].dtype == torch.uint8 and state["wide.weight.state1"].any()
    assert len(state["wide.weight.absmax1"]) == 32 * 160 / 256 and len(state["wide.weight.qmap1"]) == 256
    assert state["narrow.weight.state1"].dtype == torch.float32  # too small to be worth it
    assert state["late.weight.step"] == 1 and state["wide.weight.step"] == 3


@pytest.mark.slow
def test_in_deepspeed(tmp_path):
    """Also a save before the first step that counts, as of fp16 while its loss scale is still searched for.

    And what a step costs: DeepSpeed checks every gradient for NaN and Inf, a dozen kernels a parameter, unless that is
    switched off; the norm, which it computes anyway, finds them too.
    """
    pytest.importorskip("bitsandbytes")
    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    here = {"PYTHONPATH": f".:tests:{os.environ.get('PYTHONPATH', '')}"} | {k: str(v) for k, v in rank.items()}
    done = run([sys.executable, __file__, tmp_path], **here)
    results = json.loads((tmp_path / "results.json").read_text())
    operations = {name: results.pop(name, None) for name in ("zero1", "zero2")}
    assert done.returncode == 0 and results == {str(case): "same" for case in IN_DEEPSPEED}, results
    assert all(0 < count <= FEW for count in operations.values()), operations


class Counting(TorchDispatchMode):
    """Counts operations that are no mere views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        views = any(
            result.alias_info is not None and not result.alias_info.is_write for result in function._schema.returns
        )
        self.count += not views
        return function(*args, **(kwargs or {}))


def operations_per_parameter(file: Path) -> float:
    """Of the optimizer's step under a file of zero_configs/, by the difference of two models."""
    import deepspeed

    counts = []
    for depth in (10, 30):
        config = json.loads(file.read_text()) | {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0}
        config = {key: value for key, value in config.items() if value != "auto"}
        config["bf16"]["enabled"], config["fp16"]["enabled"] = True, False
        model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(depth))).bfloat16()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for step in range(2):
            engine.backward(engine(batch(step).bfloat16()).float().square().mean())
            with Counting() as counting:
                engine.step()
        counts.append(counting.count)
    return (counts[1] - counts[0]) / 20


def main(folder: Path) -> None:
    import deepspeed

    deepspeed.init_distributed()
    results = {name: operations_per_parameter(ROOT / "zero_configs" / f"{name}.json") for name in ("zero1", "zero2")}
    for case in IN_DEEPSPEED:
        stage, name, stop = case
        try:
            check_resumes(lambda seed, s=stage, n=name: InDeepSpeed(n, seed, s), folder, stop)
            results[str(case)] = "same"
        except Exception as error:  # each case is reported by itself
            results[str(case)] = f"{type(error).__name__}: {error}"
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
