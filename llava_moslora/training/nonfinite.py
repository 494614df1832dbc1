"""Stops a run at a step whose loss or gradient is NaN or Inf, and names the records of that step.

By default the Trainer hides such a step: it logs the loss as 0, and DeepSpeed skips the update and continues.

Losses stay on the device until the gradient norm is read, once per step: reading each of them before its backward would
leave the GPU idle while backward is launched. If the optimizer's step does not wait for the device either
(host_overhead.py), both are read one step later, and before anything is logged, evaluated or saved. By then the weights
may have been updated, but the run ends before they are saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed

from llava_moslora.distributed import from_all_ranks, rank
from llava_moslora.errors import Refusal
from llava_moslora.files.disk import write_json

NONFINITE_FILE = "nonfinite.json"
FIX = "lower --learning_rate, inspect these records, or train in bf16 instead of fp16"
NONFINITE_LOSS, FINITE_LOSS = "the loss became NaN or Inf", "a finite loss on every rank"
FINITE_GRADIENT = "a finite gradient"


@dataclass
class _Step:
    """A step that has been launched, but whose loss and gradient norm have not been checked yet.

    Args:
        number: updates before it.
        records, losses: as in :class:`FiniteCheck`.
        numbers: float64[2] on the host: how many losses are NaN or Inf, and the norm.
        copied: event after which they are available; None: already available.
    """

    number: int
    records: list[list[int]]
    losses: list[Tensor]
    numbers: Tensor
    copied: torch.cuda.Event | None


@dataclass
class FiniteCheck:
    """Checks the loss and the gradient of every step, and stops the run on all ranks.

    Args:
        run: the run folder. ``nonfinite.json`` is written there if the run stops: the records and the loss of every
            micro-batch of the global batch that was computed, on every rank.
    """

    run: Path
    records: list[list[int]] = field(default_factory=list)  # of this step's micro-batches, on this rank
    losses: list[Tensor] = field(default_factory=list)  # of this step's micro-batches so far, float[] each
    checked: bool = False  # whether this step has been
    skipped_steps: int = 0  # DeepSpeed's count at the last check
    launched: _Step | None = None  # the step before, if it is checked later

    def begin_step(self, records: list[list[int]]) -> None:
        self.records, self.losses, self.checked = records, [], False

    def add_loss(self, loss: Tensor) -> None:
        """The next micro-batch's loss, float[], for :meth:`check`."""
        self.losses.append(loss.detach())

    def check(
        self, step: int, norm: Tensor | float | None, engine, parameters: dict[str, torch.nn.Parameter]
    ) -> float | None:
        """Check the losses and the gradient norm of the global batch. Without DeepSpeed nothing has been updated yet;
        with it the update has been made or skipped. Collective; the host waits for the device once.

        Args:
            step: number of updates before this one.
            norm: of the whole gradient; None where the engine has none (ZeRO stage 0 in float32): then the updated
                ``parameters`` are checked.
            engine: the DeepSpeed engine, or None.

        Returns:
            The norm as a number.

        Raises:
            Refusal: R-NONFINITE, a loss or the gradient is NaN or Inf on some rank. A gradient that overflows while
                fp16 searches for its loss scale does not count.
        """
        nonfinite = self._nonfinite_losses()
        nonfinite_losses, norm = self._to_host(nonfinite, norm)
        if nonfinite_losses:
            self._stop(step, NONFINITE_LOSS, FINITE_LOSS)
        skipped_steps = 0 if engine is None else engine.skipped_steps
        skipped, self.skipped_steps = skipped_steps > self.skipped_steps, skipped_steps
        if not (skipped and searches_loss_scale(engine)):
            if norm is None:
                finite = bool(torch.stack([torch.isfinite(p).all() for p in parameters.values()]).all())
            else:
                finite = is_finite_norm(norm)
            if skipped or not finite:
                reason = "DeepSpeed skipped the update" if skipped else f"gradient norm {norm}"
                self._stop(step, nonfinite_gradient(reason), FINITE_GRADIENT)
        self.checked = True
        return norm

    def check_later(self, step: int, norm: Tensor) -> Tensor:
        """As :meth:`check`, without waiting for the current step: the step before is checked now, this one by the next
        call or by :meth:`settle`."""
        self.settle()
        numbers = torch.stack([self._nonfinite_losses(), norm.detach().double()])
        copied = None
        if numbers.is_cuda:
            on_host = torch.empty(2, dtype=torch.float64, pin_memory=True)
            numbers = on_host.copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self.launched = _Step(step, self.records, self.losses, numbers, copied)
        self.checked = True
        return norm

    def settle(self) -> None:
        """Check the step that :meth:`check_later` has left, if any. Before logging, evaluating and saving.

        Raises:
            Refusal: R-NONFINITE, as :meth:`check`.
        """
        step, self.launched = self.launched, None
        if step is None:
            return
        if step.copied is not None:
            step.copied.synchronize()
        nonfinite_losses, norm = step.numbers.tolist()
        if nonfinite_losses or not is_finite_norm(norm):
            self.records, self.losses = step.records, step.losses
            self._stop(step.number, nonfinite_gradient(f"gradient norm {norm}"), FINITE_GRADIENT)

    def require_checked(self) -> None:
        """Call after each step: it fails if the Trainer or DeepSpeed did not call the check."""
        assert self.checked and len(self.losses) == len(self.records), "this step's loss and gradient were not checked"

    def loss_scale_exhausted(self, step: int) -> NoReturn:
        self._stop(step, "the gradient overflows float16 at the smallest loss scale", FINITE_GRADIENT)

    def _nonfinite_losses(self) -> Tensor:
        """Number of micro-batches of all ranks whose loss is NaN or Inf, float64[], on the device."""
        nonfinite = (~torch.isfinite(torch.stack(self.losses))).sum().double()
        if distributed.is_initialized():
            distributed.all_reduce(nonfinite)
        return nonfinite

    def _to_host(self, nonfinite: Tensor, norm: Tensor | float | None) -> tuple[int, float | None]:
        """Both as numbers, in one copy from the device."""
        if not isinstance(norm, Tensor):
            return int(nonfinite), norm
        count, number = torch.stack([nonfinite, norm.detach().to(nonfinite)]).tolist()
        return int(count), number

    def _stop(self, step: int, what: str, expected: str) -> NoReturn:
        computed = len(self.losses)
        # the losses as text: JSON has no NaN
        of_this_rank: list[dict[str, Any]] = [
            {"rank": rank(), "records": records, "loss": str(float(loss))}
            for records, loss in zip(self.records[:computed], self.losses, strict=True)
        ]
        batches = [batch for of_rank in from_all_ranks(of_this_rank) for batch in of_rank]
        suspects = [b for b in batches if not math.isfinite(float(b["loss"]))]
        if suspects:  # a gradient that is not finite is then only a consequence
            what, expected = NONFINITE_LOSS, FINITE_LOSS
        suspects = suspects or batches
        if rank() == 0:
            write_json(self.run / NONFINITE_FILE, {"step": step, "batches": batches})
        records = [record for batch in suspects for record in batch["records"]]
        raise Refusal(
            "R-NONFINITE",
            f"{what} at step {step}; nothing was saved with it",
            found=f"loss {suspects[0]['loss']} on records {', '.join(map(str, records[:32]))}",
            expected=expected,
            fix=f"{FIX}; all of them are in {self.run / NONFINITE_FILE}",
        )


def is_finite_norm(norm: float) -> bool:
    return math.isfinite(norm) and norm >= 0  # DeepSpeed returns -1 for a norm that is not finite


def nonfinite_gradient(reason: str) -> str:
    return f"the gradient became NaN or Inf ({reason})"


def searches_loss_scale(engine) -> bool:
    """Whether fp16 still searches for its loss scale: it is halved, and the step skipped, until nothing overflows."""
    scaler: Any = getattr(engine.optimizer, "loss_scaler", None)
    return engine.fp16_enabled() and bool(getattr(scaler, "dynamic", False)) and scaler.cur_scale > scaler.min_scale


def check_labels(labels: int, records: list[int]) -> None:
    """
    Raises:
        Refusal: D-LABELS, a batch with 0 labels: it has no loss.
    """
    if not labels:
        raise Refusal(
            "D-LABELS", "no token of this batch has a label", found=f"records {', '.join(map(str, records))}",
            fix="prepare the data with scripts/prepare_data.py, which refuses such records",
        )  # fmt: skip


def out_of_memory(batch_size: int) -> Refusal:
    """E-MEMORY, with the device's memory statistics."""
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_reserved()
    return Refusal(
        "E-MEMORY",
        "out of device memory in a training step; the last checkpoint is untouched",
        found=f"{total / 2**30:.1f} GiB in total, {peak / 2**30:.1f} GiB peak, {free / 2**30:.1f} GiB free",
        fix=f"lower --per_device_train_batch_size (now {batch_size}) and raise --gradient_accumulation_steps by the "
        "same factor, --recompute full, zero_configs/zero3.json, or --bits 4; "
        "scripts/plan.py --suggest finds the fastest setting that fits",
    )
