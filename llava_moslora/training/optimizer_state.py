"""What a training run consists of besides frozen weights, in a form that no ZeRO stage and no world size owns.

Per trained parameter, whole: the float32 master weight and whatever the optimizer keeps for it (Adam: two moments and
a count of steps), in the optimizer's own dtypes; the mixers that were drawn for this run and frozen; beside them the
schedule's position, the fp16 loss scale and each rank's random streams. DeepSpeed's own checkpoints are not used:
they are pickles, and one stage's or world size's cannot be read by another.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

NUMBER = torch.float64  # numbers beside the tensors of an optimizer's state, such as Adam's step, are kept as float64[]


@dataclass(frozen=True)
class TrainState:
    """Where a run's float32 state lives: in the optimizer itself, or in a DeepSpeed engine.

    There are three places. Without partitions the optimizer steps whole tensors, one a parameter: the parameters
    themselves (no DeepSpeed, or its stage 0 in float32), or float32 copies of them (stage 0 in 16 bits). ZeRO steps
    flat tensors that many parameters share, of which a rank has its part.

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
        parameter = next(iter(self.parameters.values()))
        return self.engine is not None and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"))

    def begin(self) -> None:
        """Take back the step that DeepSpeed's stage 0 takes in 16 bits before the first gradient.

        It takes it, with gradients of zero, to make the optimizer's state: Adam's bias corrections would be those of
        the step after, and weight decay would have been applied once more.
        """
        if self.partitioned or not hasattr(getattr(self.engine, "optimizer", None), "fp32_groups"):
            return
        self._torch_optimizer.state.clear()
        parameters = self.parameters
        for name, master in self._whole.items():
            master.data.copy_(parameters[name])

    def masters(self) -> dict[str, Tensor]:
        """Every trained parameter and every frozen mixer whole, float32, on the CPU. Collective."""
        if not self.partitioned:
            masters = {name: _cpu(tensor, torch.float32) for name, tensor in self._whole.items()}
        else:
            from deepspeed.utils import safe_get_full_fp32_param  # imported here: not needed without DeepSpeed

            masters = {n: _cpu(safe_get_full_fp32_param(p), torch.float32) for n, p in self.parameters.items()}
        frozen = frozen_mixers(self.model)
        with _gathered(frozen.values()):
            return masters | {name: _cpu(parameter, torch.float32) for name, parameter in frozen.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """``NAME.KEY`` for all that the optimizer keeps for a parameter, whole, on the CPU. Collective.

        A parameter that the optimizer has not stepped yet has nothing: of fp16 that is all of them until the search
        for a loss scale has ended.
        """
        if not self.partitioned:
            state = self._torch_optimizer.state
            return {
                f"{name}.{key}": _cpu(value) if _is_tensor(value) else _number(value)
                for name, tensor in self._whole.items()
                for key, value in state.get(tensor, {}).items()
            }
        from deepspeed.utils import safe_get_full_optimizer_state as whole

        elements, numbers = self._kept_in_flats()
        if elements:
            self._link_state()
        found = {f"{n}.{key}": _cpu(whole(p, key)) for n, p in self.parameters.items() for key in elements}
        return found | {f"{n}.{key}": _number(value) for n in self.parameters for key, value in numbers.items()}

    def loss_scale(self) -> dict | None:
        """State of the fp16 loss scale search; None in other precisions."""
        scaler = self._loss_scaler
        return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float | bool)} if scaler else None

    def make_optimizer_state(self) -> None:
        """Let the optimizer make its state, as it does at its first step, for :meth:`restore` to write into.

        By a step with gradients of zero: it may move the masters, which are then restored too. Before the first step.
        """
        optimizer = self._torch_optimizer
        zero3 = getattr(getattr(self.engine, "optimizer", None), "fp32_partitioned_groups_flat", None)
        for number, flat in enumerate(zero3 or []):  # ZeRO-3 empties its param_groups between steps
            group = self.engine.optimizer.sub_group_to_group_id[number]
            optimizer.param_groups[group]["params"].append(flat)
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        before = [tensor.grad for tensor in tensors]
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        for tensor, gradient in zip(tensors, before, strict=True):
            tensor.grad = gradient
        for group in optimizer.param_groups if zero3 else []:
            group["params"] = []

    def restore(self, masters: dict[str, Tensor], state: dict[str, Tensor], loss_scale: dict | None) -> None:
        """Put a state back, whatever stage and world size it came from. Collective; before the first step.

        Args:
            masters, state: as :meth:`masters` and :meth:`optimizer_state` gave them; frozen mixers that are not in
                ``masters`` stay as they are.
        """
        if differing := set(masters) - set(frozen_mixers(self.model)) ^ set(self.parameters):
            raise KeyError(f"other parameters: {sorted(differing)[:4]}")
        if self.partitioned:
            self._restore_flats(masters, state)
        else:
            self._restore_whole(masters, state)
        self._set_working_weights(masters)
        if loss_scale is not None and self._loss_scaler is not None:  # going on without DeepSpeed there is none
            vars(self._loss_scaler).update(loss_scale)

    @property
    def _loss_scaler(self) -> object | None:
        return getattr(getattr(self.engine, "optimizer", None), "loss_scaler", None)

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        found = self.optimizer if self.engine is None else self.engine.optimizer
        while not isinstance(found, torch.optim.Optimizer):  # DeepSpeed's wrap it
            found = found.optimizer
        return found

    @property
    def _whole(self) -> dict[str, Tensor]:
        """What the optimizer steps for each parameter: itself, or its float32 copy in DeepSpeed's stage 0."""
        wrapper = getattr(self.engine, "optimizer", None)
        groups = zip(getattr(wrapper, "fp16_groups", []), getattr(wrapper, "fp32_groups", []), strict=True)
        copies = {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}
        return {name: copies.get(id(p), p) for name, p in self.parameters.items()}

    def _flats(self) -> list[Tensor]:
        """This rank's parts of the masters, as ZeRO glued them together."""
        flats = getattr(self.engine.optimizer, "fp32_partitioned_groups_flat", None)
        return flats or [flat for group in self._torch_optimizer.param_groups for flat in group["params"]]

    def _kept_in_flats(self) -> tuple[list[str], dict[str, float]]:
        """Of the state in ZeRO's flats: the keys with a number for each weight, and the numbers of a whole flat."""
        flat = self._flats()[0]
        state = self._torch_optimizer.state.get(flat, {})
        elements = [key for key, value in state.items() if _is_tensor(value)]
        for key in elements:
            assert state[key].shape == flat.shape, f"{key} of {type(self._torch_optimizer).__name__} is not cut by ZeRO"
        return elements, {key: float(value) for key, value in state.items() if key not in elements}

    def _restore_whole(self, masters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        made = self._torch_optimizer.state
        for name, tensor in self._whole.items():
            tensor.data.copy_(masters[name])
            _fill(made[tensor], {key: state.get(f"{name}.{key}") for key in made[tensor]})
            if not made[tensor]:
                del made[tensor]  # not stepped yet: an optimizer takes an empty one for one that it has made

    def _restore_flats(self, masters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        elements, numbers = self._kept_in_flats()
        if elements:
            self._link_state()
        for name, parameter in self.parameters.items():
            _set_partition(parameter, masters[name], None)
            for key in elements:
                if f"{name}.{key}" in state:
                    _set_partition(parameter, state[f"{name}.{key}"], key)
        optimizer = self._torch_optimizer
        if not state:
            optimizer.state.clear()
            return
        # one count for all: parameters whose counts differ can only come from a run without ZeRO
        names = list(self.parameters)
        most = {key: max(state[f"{name}.{key}"] for name in names if f"{name}.{key}" in state) for key in numbers}
        for flat in self._flats():
            _fill(optimizer.state[flat], most)

    def _link_state(self) -> None:
        """Let ZeRO-1 and -2 find each parameter's part of the optimizer's flat state.

        They link them after the first group of parameters has taken its first step, when the other groups (another
        learning rate) have no state yet, and never again: so they are linked once more here.
        """
        zero = self.engine.optimizer
        if hasattr(zero, "_hp_optimizer_states_linked"):
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _set_working_weights(self, masters: dict[str, Tensor]) -> None:
        """The model's weights are the masters rounded; DeepSpeed would make them so only at the next step."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in masters}
        with _gathered(parameters.values(), modified=True), torch.no_grad():
            for name, parameter in parameters.items():
                parameter.data.copy_(masters[name])


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen_mixers(model: nn.Module) -> dict[str, nn.Parameter]:
    """Mixers that this run drew and does not train: no base model's folder has them."""
    return {name: p for name, p in model.named_parameters() if ".lora_mixer." in name and not p.requires_grad}


def trained_count(model: nn.Module) -> int:
    """Numbers that are trained, also of parameters that ZeRO-3 holds as empty shards."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in trained_parameters(model).values())


def _cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    assert tensor is not None, "DeepSpeed does not hold this part of its state whole"
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


def _is_tensor(value: object) -> bool:
    """Whether a part of an optimizer's state is more than a number: torch's Adam counts its steps in a float32[]."""
    return isinstance(value, Tensor) and value.dim() > 0


def _number(value: float | Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=NUMBER)


def _fill(made: dict[str, object], values: dict[str, object]) -> None:
    """Write values into the state that an optimizer has made, each into its own tensor or as its own kind of number.

    What has no value is taken out.
    """
    for key, value in values.items():
        if value is None:
            del made[key]
        elif isinstance(made[key], Tensor):
            made[key].copy_(value)
        else:
            made[key] = type(made[key])(value)


@contextmanager
def _gathered(parameters: Iterable[nn.Parameter], modified: bool = False) -> Iterator[None]:
    """Those of ``parameters`` that ZeRO-3 has partitioned are whole inside. Collective."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(partitioned, modifier_rank=0 if modified else None):
        yield


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
