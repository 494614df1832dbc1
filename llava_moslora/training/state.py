"""What a training run consists of besides frozen weights, in a form that no ZeRO stage and no world size owns.

Per trained parameter, whole and in float32: the master weight and Adam's two moments; beside them how many steps Adam
took, the schedule's position, the fp16 loss scale and each rank's random streams. DeepSpeed's own checkpoints are not
used: they are pickles, and one stage's or world size's cannot be read by another.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Holder:
    """Where a run's float32 state lives: in the optimizer itself, or partitioned inside a DeepSpeed engine.

    Args:
        model: with the trained parameters; names are this model's.
        optimizer: the torch optimizer that was made for them.
        engine: the DeepSpeed engine, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    engine: object | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return trained_parameters(self.model)

    @property
    def partitioned(self) -> bool:
        """Whether DeepSpeed keeps masters of its own (it does not at ZeRO stage 0 in float32)."""
        parameter = next(iter(self.parameters.values()))
        return self.engine is not None and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"))

    def masters(self) -> dict[str, Tensor]:
        """Every trained parameter whole, float32, on the CPU. Collective."""
        if not self.partitioned:
            return {name: _cpu(parameter) for name, parameter in self.parameters.items()}
        from deepspeed.utils import safe_get_full_fp32_param  # imported here: not needed to train without DeepSpeed

        return {name: _cpu(safe_get_full_fp32_param(parameter)) for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, Tensor]:
        """``NAME.exp_avg`` and ``NAME.exp_avg_sq`` whole, float32, on the CPU. Collective; after the first step."""
        if not self.partitioned:
            state = self.optimizer.state
            return {f"{n}.{key}": _cpu(state[p][key]) for n, p in self.parameters.items() for key in MOMENTS}
        from deepspeed.utils import safe_get_full_optimizer_state as whole

        self._link_adam_state()
        return {f"{n}.{key}": _cpu(whole(p, key)) for n, p in self.parameters.items() for key in MOMENTS}

    def adam_steps(self) -> int:
        """Optimizer steps taken; steps that DeepSpeed skipped for a non-finite gradient are not among them."""
        return int(next(iter(self._torch_optimizer.state.values()))["step"])

    def loss_scale(self) -> dict | None:
        """State of the fp16 loss scale search; None in other precisions."""
        scaler = getattr(getattr(self.engine, "optimizer", None), "loss_scaler", None)
        return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float | bool)} if scaler else None

    def restore(
        self, masters: dict[str, Tensor], moments: dict[str, Tensor], adam_steps: int, loss_scale: dict | None
    ) -> None:
        """Put a state back, whatever stage and world size it came from. Collective; before the first step."""
        if set(masters) != set(self.parameters):
            raise KeyError(f"other parameters: {sorted(set(masters) ^ set(self.parameters))[:4]}")
        if not self.partitioned:
            for name, parameter in self.parameters.items():
                parameter.data.copy_(masters[name])
                state = {key: moments[f"{name}.{key}"].to(parameter.device) for key in MOMENTS}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(adam_steps)), **state}
            return
        self._make_adam_state(adam_steps)
        for name, parameter in self.parameters.items():
            _set_partition(parameter, masters[name], None)
            for key in MOMENTS:
                _set_partition(parameter, moments[f"{name}.{key}"], key)
        self._set_working_weights(masters)
        if loss_scale is not None:
            vars(self.engine.optimizer.loss_scaler).update(loss_scale)

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return self.engine.optimizer.optimizer if self.partitioned else self.optimizer

    def _make_adam_state(self, adam_steps: int) -> None:
        """Adam makes its state at its first step; DeepSpeed then links it to the parameters. Both are done here."""
        zero = self.engine.optimizer
        flats = getattr(zero, "fp32_partitioned_groups_flat", None)  # ZeRO-3 empties its param_groups between steps
        if flats is None:
            flats = [flat for group in self._torch_optimizer.param_groups for flat in group["params"]]
        for flat in flats:
            step = torch.tensor(
                float(adam_steps), device=flat.device if self._torch_optimizer.defaults.get("fused") else "cpu"
            )
            zeros = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            count = (
                step
                if isinstance(self._torch_optimizer, torch.optim.Optimizer)
                and not _counts_in_int(self._torch_optimizer)
                else adam_steps
            )
            self._torch_optimizer.state[flat] = {"step": count, **zeros}
        self._link_adam_state()

    def _link_adam_state(self) -> None:
        """Let ZeRO-1 and -2 find each parameter's moments in Adam's flat state.

        They link them after the first group of parameters has taken its first step, when the other groups (another
        learning rate) have no state yet, and never again: so it is done anew here.
        """
        zero = self.engine.optimizer
        if hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _set_working_weights(self, masters: dict[str, Tensor]) -> None:
        """The 16-bit weights are the masters rounded; DeepSpeed would make them so only at the next step."""
        from deepspeed import zero

        parameters = self.parameters
        partitioned = [p for p in parameters.values() if hasattr(p, "ds_id")]
        with zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)), torch.no_grad():
            for name, parameter in parameters.items():
                parameter.data.copy_(masters[name])


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_count(model: nn.Module) -> int:
    """Numbers that are trained, also of parameters that ZeRO-3 holds as empty shards."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in trained_parameters(model).values())


def _cpu(tensor: Tensor) -> Tensor:
    assert tensor is not None, "DeepSpeed does not hold this part of its state whole"
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _counts_in_int(optimizer: torch.optim.Optimizer) -> bool:
    """DeepSpeed's own Adams count steps in a Python int, torch's in a tensor."""
    return type(optimizer).__module__.startswith("deepspeed.")


def _set_partition(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """This rank's share of a whole float32 tensor, into the master (key None) or a moment."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        value = value.to(parameter.device)
        safe_set_full_optimizer_state(parameter, value, key) if key else safe_set_full_fp32_param(parameter, value)
        return
    # ZeRO-3 pads the last rank's share, which DeepSpeed's whole-tensor setter does not: cut the shares here.
    mine = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
    rank = torch.distributed.get_rank()
    share = torch.zeros_like(mine)
    flat = value.flatten()[rank * mine.numel() : (rank + 1) * mine.numel()]
    share[: flat.numel()] = flat
    safe_set_local_optimizer_state(parameter, share, key) if key else safe_set_local_fp32_param(parameter, share)


def random_state() -> dict:
    """This process's random streams as JSON: Python, NumPy, torch on the CPU and on each of its CUDA devices."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict) -> None:
    """Put back what :func:`random_state` returned, after a way through JSON."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_decode(s) for s in state["cuda"]])


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever is drawn inside, the random streams go on afterwards as if nothing had been."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
