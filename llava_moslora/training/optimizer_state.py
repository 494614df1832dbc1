"""The float32 weights and the optimizer's state of a run, read and written independently of ZeRO stage and world size.

For each trained parameter, unpartitioned: the float32 master weight and its optimizer state (Adam: two moments and a
step count), in the optimizer's own dtypes; also the frozen factors, and the state of the fp16 loss scale.
DeepSpeed's own checkpoints are not used: they are pickles, and cannot be loaded under another stage or world size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SCALAR_DTYPE = torch.float64  # of scalars in an optimizer's state, such as Adam's step count: float64[]


@dataclass(frozen=True)
class TrainState:
    """Access to the float32 weights and the optimizer's state of a run.

    They are in one of three places. Unpartitioned, the optimizer steps one tensor per parameter: the parameters
    themselves (no DeepSpeed, or its stage 0 in float32), or float32 copies of them (stage 0 in 16 bits). Partitioned
    (ZeRO-1, -2 and -3), it steps this rank's shards of flat tensors, each a concatenation of many parameters.

    Args:
        model: parameter names are this model's.
        optimizer: the torch optimizer of its trained parameters.
        engine: the DeepSpeed engine, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    engine: Any = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return trained_parameters(self.model)

    @property
    def partitioned(self) -> bool:
        parameter = next(iter(self.parameters.values()))
        return self.engine is not None and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"))

    def undo_initial_step(self) -> None:
        """Undo the step with gradients of zero by which DeepSpeed's stage 0 creates the optimizer's state in 16 bits.

        Otherwise Adam's bias correction would be one step ahead, and weight decay would be applied once too often.
        """
        if self.partitioned or not hasattr(getattr(self.engine, "optimizer", None), "fp32_groups"):
            return
        self._torch_optimizer.state.clear()
        parameters = self.parameters
        for name, master in self._stepped_tensors.items():
            master.data.copy_(parameters[name])

    def masters(self, keep: bool = True) -> dict[str, Tensor]:
        """Every trained parameter and every frozen factor, unpartitioned, float32, on the CPU. Collective.

        Args:
            keep: whether this rank uses them. A rank that does not takes part, keeps nothing, and gets {}.
        """
        masters: dict[str, Tensor] = {}
        if not self.partitioned:
            tensors: Iterable[tuple[str, Tensor]] = self._stepped_tensors.items() if keep else ()
        else:
            from deepspeed.utils import safe_get_full_fp32_param  # imported here: not needed without DeepSpeed

            tensors = ((name, safe_get_full_fp32_param(p)) for name, p in self.parameters.items())
        for name, tensor in tensors:
            if keep:
                masters[name] = _to_cpu(tensor, torch.float32)
        frozen = frozen_factors(self.model)
        with _gathered(frozen.values()):
            return masters | {n: _to_cpu(factor, torch.float32) for n, factor in frozen.items() if keep}

    def optimizer_state(self, keep: bool = True) -> dict[str, Tensor]:
        """``NAME.KEY`` → the optimizer state of a parameter, unpartitioned, on the CPU. Collective.

        A parameter that has not been stepped yet has no state; with fp16 none has until a loss scale is found.
        ``keep`` as for :meth:`masters`.
        """
        if not self.partitioned:
            of_tensor = self._torch_optimizer.state
            return {
                f"{name}.{key}": _to_cpu(value) if _is_elementwise(value) else _scalar(value)
                for name, tensor in (self._stepped_tensors if keep else {}).items()
                for key, value in of_tensor.get(tensor, {}).items()
            }
        from deepspeed.utils import safe_get_full_optimizer_state as full_state

        elementwise, scalars = self._flat_state_keys()
        if elementwise:
            self._link_state()
        state = {}
        for name, parameter in self.parameters.items():
            for key in elementwise:
                whole = full_state(parameter, key)
                if keep:
                    state[f"{name}.{key}"] = _to_cpu(whole)
            state |= {f"{name}.{key}": _scalar(value) for key, value in scalars.items() if keep}
        return state

    def loss_scale(self) -> dict | None:
        """State of the fp16 loss scale search; None in other precisions."""
        scaler = self._loss_scaler
        return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float | bool)} if scaler else None

    def create_optimizer_state(self) -> None:
        """Make the optimizer create its state, for :meth:`restore` to overwrite, by a step with gradients of zero.

        Before the first step. It may change the masters, which are restored too.
        """
        optimizer = self._torch_optimizer
        zero3_flats = getattr(getattr(self.engine, "optimizer", None), "fp32_partitioned_groups_flat", None)
        for number, flat in enumerate(zero3_flats or []):  # ZeRO-3 empties its param_groups between steps
            group = self.engine.optimizer.sub_group_to_group_id[number]
            optimizer.param_groups[group]["params"].append(flat)
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        before = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        for tensor, gradient in zip(tensors, before, strict=True):
            tensor.grad = gradient
        for group in optimizer.param_groups if zero3_flats else []:
            group["params"] = []

    def restore(self, masters: dict[str, Tensor], state: dict[str, Tensor], loss_scale: dict | None) -> None:
        """Restore what :meth:`masters`, :meth:`optimizer_state` and :meth:`loss_scale` returned, under any stage and
        world size. Frozen factors that are not in ``masters`` are unchanged. Collective; before the first step."""
        if differing := set(masters) - set(frozen_factors(self.model)) ^ set(self.parameters):
            raise KeyError(f"other parameters: {sorted(differing)[:4]}")
        if self.partitioned:
            self._restore_partitioned(masters, state)
        else:
            self._restore_unpartitioned(masters, state)
        self._repeat_powers()
        self._set_working_weights(masters)
        if loss_scale is not None and self._loss_scaler is not None:  # a run without DeepSpeed has no scaler
            vars(self._loss_scaler).update(loss_scale)

    @property
    def _loss_scaler(self) -> Any:
        return getattr(getattr(self.engine, "optimizer", None), "loss_scaler", None)

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer if self.engine is None else self.engine.optimizer
        while not isinstance(optimizer, torch.optim.Optimizer):  # DeepSpeed's wrap it
            optimizer = optimizer.optimizer
        return optimizer

    @property
    def _stepped_tensors(self) -> dict[str, Tensor]:
        """Unpartitioned: the tensor that the optimizer updates for each parameter: itself, or its float32 copy."""
        wrapper = getattr(self.engine, "optimizer", None)
        groups = zip(getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", []), strict=True)
        copies = {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}
        return {name: copies.get(id(p), p) for name, p in self.parameters.items()}

    def _flat_masters(self) -> list[Tensor]:
        """Partitioned: the tensors that the optimizer updates: this rank's shards of the flat master weights."""
        flats = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)
        return flats or [flat for group in self._torch_optimizer.param_groups for flat in group["params"]]

    def _flat_state_keys(self) -> tuple[list[str], dict[str, float]]:
        """The optimizer's state for a flat tensor: keys with one value per weight, and scalars by key."""
        flat = self._flat_masters()[0]
        state = self._torch_optimizer.state.get(flat, {})
        elementwise = [key for key, value in state.items() if _is_elementwise(value)]
        for key in elementwise:
            assert state[key].shape == flat.shape, f"{key} is not partitioned as its weights are"
        return elementwise, {key: float(value) for key, value in state.items() if key not in elementwise}

    def _restore_unpartitioned(self, masters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        created = self._torch_optimizer.state
        for name, tensor in self._stepped_tensors.items():
            tensor.data.copy_(masters[name])
            _overwrite(created[tensor], {key: state.get(f"{name}.{key}") for key in created[tensor]})
            if not created[tensor]:
                del created[tensor]  # not updated yet: an optimizer would treat an empty entry as an initialised one

    def _restore_partitioned(self, masters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        elementwise, scalars = self._flat_state_keys()
        if elementwise:
            self._link_state()
        for name, parameter in self.parameters.items():
            _set_shard(parameter, masters[name], None)
            for key in elementwise:
                if f"{name}.{key}" in state:
                    _set_shard(parameter, state[f"{name}.{key}"], key)
        optimizer = self._torch_optimizer
        if not state:
            optimizer.state.clear()
            return
        # one step count for all: parameters whose counts differ can only come from a run without ZeRO
        names = list(self.parameters)
        largest = {key: max(state[f"{name}.{key}"] for name in names if f"{name}.{key}" in state) for key in scalars}
        for flat in self._flat_masters():
            _overwrite(optimizer.state[flat], largest)

    def _repeat_powers(self) -> None:
        """Give DeepSpeed's CPU Adam the same powers of its betas as in an uninterrupted run.

        Its C++ side keeps βᵗ in float32, multiplied by β at each step, but uses pow(β, t) if steps are not consecutive,
        as after a resume (csrc/includes/cpu_adam.h, IncrementStep). The two differ in the last bit at some steps, in
        1 - βᵗ by more, and so would all weights from there on.
        """
        adam = self._torch_optimizer
        if not hasattr(adam, "ds_opt_adam"):
            return
        done = max((int(state["step"]) for state in adam.state.values() if "step" in state), default=0)
        betas, nothing = adam.param_groups[0]["betas"], [torch.zeros(1) for _ in range(4)]
        for step in range(1, done + 1):  # on one weight of 0, with a learning rate of 0
            adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, *betas, 1.0, 0.0, True, *nothing)

    def _link_state(self) -> None:
        """Make ZeRO-1 and -2 find each parameter's part of the optimizer's flat state.

        They link only once, after the first step of the first parameter group, when the others have no state yet.
        """
        zero = self.engine.optimizer
        if hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _set_working_weights(self, masters: dict[str, Tensor]) -> None:
        """Round the master weights into the model's weights, which DeepSpeed would do only at the next step."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in masters}
        with _gathered(parameters.values(), modified=True), torch.no_grad():
            for name, parameter in parameters.items():
                parameter.data.copy_(masters[name])


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Frozen adapter tensors that were drawn or computed for this run: mixers, LoRA-XS' A and B, PiSSA's A₀, B₀."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name and not p.requires_grad}


def trained_count(model: nn.Module) -> int:
    """Number of trained weights, also of parameters that ZeRO-3 holds as empty shards."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in trained_parameters(model).values())


def _to_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    assert tensor is not None, "DeepSpeed does not return this part of its state"
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _is_elementwise(value: object) -> bool:
    """Not a scalar; torch's Adam counts its steps in a float32[]."""
    return isinstance(value, Tensor) and value.dim() > 0


def _scalar(value: float | Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=SCALAR_DTYPE)


def _overwrite(created: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Write values into the state that an optimizer has created, keeping its tensors and types; None deletes a key."""
    for key, value in values.items():
        if value is None:
            del created[key]
        elif isinstance(created[key], Tensor):
            created[key].copy_(value)
        else:
            created[key] = type(created[key])(value)


@contextmanager
def _gathered(parameters: Iterable[nn.Parameter], modified: bool = False) -> Iterator[None]:
    """Gathers those of ``parameters`` that ZeRO-3 has partitioned. Collective."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(partitioned, modifier_rank=0 if modified else None):
        yield


def _set_shard(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """Set this rank's shard of an unpartitioned float32 tensor, of the master (key None) or of a moment."""
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
    # ZeRO-3 pads the last rank's shard, which DeepSpeed's full-tensor setter does not: cut the shards here.
    local = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
    rank = torch.distributed.get_rank()
    shard = torch.zeros_like(local)
    flat = value.flatten()[rank * local.numel() : (rank + 1) * local.numel()]
    shard[: flat.numel()] = flat
    safe_set_local_optimizer_state(parameter, shard, key) if key else safe_set_local_fp32_param(parameter, shard)
