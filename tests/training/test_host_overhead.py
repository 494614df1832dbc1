"""Work and waits of the host that are spared at every step, and what must still happen."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava_moslora.training.host_overhead import clear_trained_gradients, step_without_waiting, switch_mode_once
from support.launching import free_port, run

STEPS = 4
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero")  # for which the host waits on a GPU


def engine_of(model):
    return SimpleNamespace(module=model, train=model.train)


def test_the_mode_is_switched_where_it_changes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    engine, visits = engine_of(model), []
    switch_mode_once(engine)
    inner = model[1].train
    model[1].train = lambda mode=True: visits.append(mode) or inner(mode)
    engine.train()
    assert visits == [True]  # what the model says of itself need not be true of its parts
    engine.train()
    assert visits == [True]
    model.eval()  # questions are answered in between
    engine.train()
    assert visits == [True, False, True] and model[1].training
    engine.train(False)
    assert visits == [True, False, True, False] and not model[1].training


def test_parts_that_were_loaded_in_eval_mode_train():
    """A part's loader leaves it in eval mode; the model that is put together of parts says that it trains."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval())
    assert model.training
    engine = engine_of(model)
    switch_mode_once(engine)
    engine.train()
    assert model[1].training


def test_gradients_of_what_is_trained_are_cleared():
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    engine = SimpleNamespace(module=model)
    clear_trained_gradients(engine, dict(model.named_parameters()))
    assert model.weight.grad is not None
    engine.zero_grad()
    assert model.weight.grad is None and model.bias.grad is None


class Net(nn.Module):
    """Three matrices, of which the last has no gradient in the first two steps, and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
        self.layers[1].requires_grad_(False)

    def forward(self, x, late: bool):
        for layer in self.layers[: 4 if late else 3]:
            x = layer(x).tanh()
        return x.float().square().sum()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation._schema.name)
        return operation(*args, **(kwargs or {}))


def trained(clip: float, accumulation: int, ours: bool) -> dict:
    """Weights, norms and the operations of the last step of a run in a DeepSpeed engine of one rank."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulation}
    config |= {"bf16": {"enabled": True, "immediate_grad_update": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    config |= {"gradient_clipping": clip, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    model = Net().bfloat16()
    groups = [{"params": [model.layers[0].weight], "lr": 1e-2}, {"params": [x.weight for x in model.layers[2:]]}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert step_without_waiting(engine) if ours else True
    random, norms, operations = torch.Generator().manual_seed(1), [], Operations()
    for step in range(STEPS):
        for _ in range(accumulation):
            x = torch.randn(2, 8, generator=random).bfloat16()
            engine.backward(engine(x, late=step >= 2))
            with operations:
                engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        if step < STEPS - 1:
            operations.names.clear()
    assert engine.skipped_steps == 0
    weights = [layer.weight.tolist() for layer in model.layers]
    return {"weights": weights, "norms": norms, "operations": operations.names}


@pytest.mark.slow
def test_a_step_of_zero1_is_deepspeeds_without_a_wait(tmp_path):
    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = run([sys.executable, __file__, tmp_path], PYTHONPATH=".:tests", **{k: str(v) for k, v in rank.items()})
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for clip, accumulation in CASES:
        theirs, ours = (results[f"{clip} {accumulation} {who}"] for who in (False, True))
        assert ours["norms"] == pytest.approx(theirs["norms"], rel=1e-6) and len(set(ours["norms"])) == STEPS
        assert ours["weights"] == theirs["weights"] or clip == TIGHT
        for mine, expected in zip(ours["weights"], theirs["weights"], strict=True):  # bf16 of masters 1e-6 apart
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=2**-8, atol=0)
        assert any(name in READS for name in theirs["operations"])
        assert ours["operations"] and not any(name in READS for name in ours["operations"])


TIGHT = 0.05  # clips at every step; DeepSpeed's norm, summed in another order, is another factor in its last bit
CASES = [(0.0, 1), (TIGHT, 1), (TIGHT, 2), (1e6, 1)]


def main(folder: Path) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo")
    results = {f"{clip} {n} {ours}": trained(clip, n, ours) for clip, n in CASES for ours in (False, True)}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
