"""What stops a run that has gone wrong: a step whose loss or gradient is not finite, with the records that made it.

A Trainer hides such a step: it logs the loss as 0, and DeepSpeed leaves the update out and goes on.

Losses stay on the device until the gradient is looked at, once per step: a look at each before its backward would keep
the GPU idle while backward is launched. By then DeepSpeed may have updated the weights, but the run ends before they
are saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, distributed

from llava_moslora.distributed import rank
from llava_moslora.errors import Refusal
from llava_moslora.files.json import write_json
from llava_moslora.text.conversation import IGNORE_INDEX

DUMP = "nonfinite.json"
ADVICE = "lower --learning_rate, look at these records, or train in bf16 instead of fp16"
NONFINITE_LOSS, FINITE_LOSS = "the loss became NaN or Inf", "a finite loss on every rank"


@dataclass
class FiniteCheck:
    """Watches the steps of one rank; every method that may stop the run does so on all ranks at once.

    Args:
        run: where ``nonfinite.json`` is written if the run stops: for every rank and micro-batch of the global batch,
            as far as it was computed, the records and the loss.
    """

    run: Path
    records: list[list[int]] = field(default_factory=list)  # of the current step's micro-batches on this rank
    losses: list[Tensor] = field(default_factory=list)  # of those that were computed
    skipped: int = 0  # steps that DeepSpeed had left out when it was last asked

    def begin_step(self, records: list[list[int]]) -> None:
        self.records, self.losses = records, []

    def loss(self, loss: Tensor) -> None:
        """Keep the next micro-batch's loss, float[], for :meth:`gradient` to look at."""
        self.losses.append(loss.detach())

    def gradient(
        self, step: int, norm: Tensor | float | None, engine, parameters: dict[str, torch.nn.Parameter]
    ) -> float | None:
        """Look at the losses and the gradient norm of the global batch. Without DeepSpeed nothing has been updated yet;
        with it the step has been taken or left out. Collective; the host waits for the device once.

        Args:
            norm: of the whole gradient; None where the engine does not tell (ZeRO stage 0 in float32).
            engine: the DeepSpeed engine, or None.
            parameters: looked at instead where there is no norm.

        Returns:
            The norm as a number.

        Raises:
            Refusal: R-NONFINITE, a loss is NaN or Inf on some rank; or the gradient has a NaN or Inf, and it is not the
                fp16 search for a loss scale.
        """
        bad, norm = self._on_the_host(norm)
        if bad:
            self._stop(step, NONFINITE_LOSS, FINITE_LOSS)
        skipped = 0 if engine is None else engine.skipped_steps
        grew, self.skipped = skipped > self.skipped, skipped
        if grew and searches_scale(engine):
            return norm
        if norm is None:
            finite = bool(torch.stack([torch.isfinite(p).all() for p in parameters.values()]).all())
        else:
            finite = math.isfinite(norm) and norm >= 0  # DeepSpeed says -1 for a norm that is not finite
        if grew or not finite:
            done = "DeepSpeed left the update out" if grew else f"gradient norm {norm}"
            self._stop(step, f"the gradient became NaN or Inf ({done})", "a finite gradient")
        return norm

    def _on_the_host(self, norm: Tensor | float | None) -> tuple[int, float | None]:
        """How many micro-batches of all ranks have a loss that is NaN or Inf, and the norm: one copy for both."""
        bad = (~torch.isfinite(torch.stack(self.losses))).sum().double()
        if distributed.is_initialized():
            distributed.all_reduce(bad)
        if not isinstance(norm, Tensor):
            return int(bad), norm
        count, number = torch.stack([bad, norm.detach().to(bad)]).tolist()
        return int(count), number

    def scale_exhausted(self, step: int) -> NoReturn:
        """fp16 overflows at its smallest loss scale too."""
        self._stop(step, "the gradient overflows float16 at the smallest loss scale", "a finite gradient")

    def _stop(self, step: int, what: str, expected: str) -> NoReturn:
        computed = len(self.losses)
        # the losses as text: JSON has no NaN
        mine = [
            {"rank": rank(), "records": records, "loss": str(float(loss))}
            for records, loss in zip(self.records[:computed], self.losses, strict=True)
        ]
        ranks = [mine]
        if distributed.is_initialized():
            ranks = [None] * distributed.get_world_size()
            distributed.all_gather_object(ranks, mine)
        batches = [batch for rank in ranks for batch in rank]
        suspects = [b for b in batches if not math.isfinite(float(b["loss"]))]
        if suspects:  # whatever came of it
            what, expected = NONFINITE_LOSS, FINITE_LOSS
        suspects = suspects or batches
        if rank() == 0:
            write_json(self.run / DUMP, {"step": step, "batches": batches})
        records = [record for batch in suspects for record in batch["records"]]
        raise Refusal(
            "R-NONFINITE",
            f"{what} at step {step}; nothing was saved with it",
            found=f"loss {suspects[0]['loss']} on records {', '.join(map(str, records[:32]))}",
            expected=expected,
            fix=f"{ADVICE}; all of them are in {self.run / DUMP}",
        )


def searches_scale(engine) -> bool:
    """Whether a step was left out because fp16 still looks for its loss scale: it halves it until nothing overflows."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return engine.fp16_enabled() and bool(getattr(scaler, "dynamic", False)) and scaler.cur_scale > scaler.min_scale


def check_labels(labels: Tensor, records: list[int]) -> None:
    """int64[B, T]: a batch in which nothing is trained has no loss.

    Raises:
        Refusal: D-LABELS
    """
    if not bool((labels != IGNORE_INDEX).any()):
        raise Refusal(
            "D-LABELS",
            "no token of this batch is trained",
            found=f"records {', '.join(map(str, records))}",
            fix="prepare the data with scripts/prepare_data.py, which refuses such records",
        )


def out_of_memory(batch_size: int) -> Refusal:
    """A lack of device memory, in one line with numbers."""
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_reserved()
    return Refusal(
        "E-MEMORY",
        "the device's memory is not enough for a step; the last checkpoint is untouched",
        found=f"{total / 2**30:.1f} GiB in all, {peak / 2**30:.1f} GiB used at most, {free / 2**30:.1f} GiB free",
        fix=f"lower --per_device_train_batch_size (now {batch_size}) and raise --gradient_accumulation_steps by the "
        "same factor, --recompute full, zero_configs/zero3.json, or --bits 4",
    )
