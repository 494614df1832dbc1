"""The setting of a plan: the model, the largest micro-batch, and the options that a plan may change.

No flag is read here and no file: :mod:`llava_moslora.planning.request` makes these from the flags of a training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from llava_moslora.config import AdapterSettings
from llava_moslora.models.towers import tokens_per_image


class Model:
    """The parts and what is trained in them; compared by identity, because configurations cannot be hashed.

    Args:
        vision_config: None: text only.
        dtype: of the weights in memory.
        bits: 4: NF4 linears in the LLM's layers.
        attention: ``--attn_implementation``.
        partitioned: by ZeRO-3.
    """

    def __init__(
        self,
        llm_config: PreTrainedConfig,
        vision_config: PreTrainedConfig | None,
        adapter: AdapterSettings,
        dtype: torch.dtype = torch.bfloat16,
        bits: int = 16,
        attention: str = "sdpa",
        partitioned: bool = False,
    ):
        self.llm_config, self.vision_config, self.adapter = llm_config, vision_config, adapter
        self.dtype, self.bits, self.attention, self.partitioned = dtype, bits, attention, partitioned
        self._variants: dict[tuple[int, bool], Model] = {(bits, partitioned): self}

    def variant(self, bits: int, partitioned: bool) -> Model:
        """The same parts in another precision, or partitioned or not; the same object for the same arguments."""
        key = (bits, partitioned)
        if key not in self._variants:
            parts = (self.llm_config, self.vision_config, self.adapter, self.dtype)
            self._variants[key] = other = Model(*parts, bits, self.attention, partitioned)
            other._variants = self._variants
        return self._variants[key]

    @property
    def tower_layers(self) -> int:
        """Without the last one, whose output LLaVA does not use."""
        return 0 if self.vision_config is None else self.vision_config.num_hidden_layers - 1

    @property
    def image_tokens(self) -> int:
        return 0 if self.vision_config is None else tokens_per_image(self.vision_config)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: ``rows`` padded to ``tokens`` each; ``images`` and ``labels`` (positions with a loss) in all.

    Args:
        packed: rows of several records, each row with positions of its own.
    """

    rows: int
    tokens: int
    images: int
    labels: int
    packed: bool = False


@dataclass(frozen=True)
class Zero:
    """The part of DeepSpeed's configuration that affects memory. Sizes are numbers of elements.

    Args:
        stage: None without DeepSpeed.
        fp32_gradients: gradients of all trained weights are summed in float32 on every rank (stage 1 with
            ``grad_accum_dtype`` fp32, for which DeepSpeed takes its BF16_Optimizer).
        live: ZeRO-3: gathered parameters at most. prefetch: gathered ahead. persistent: parameters below stay whole.
    """

    stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    fp32_gradients: bool = False
    bucket: int = 500_000_000
    overlap: bool = False
    live: int = 1_000_000_000
    prefetch: int = 50_000_000
    persistent: int = 100_000

    @classmethod
    def of(cls, config: dict[str, Any] | None) -> Zero:
        """From a DeepSpeed configuration, with DeepSpeed's defaults (0.19.8)."""
        if config is None:
            return cls()
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        device = {name: zero.get(f"offload_{name}", {}).get("device", "none") for name in ("optimizer", "param")}

        def size(name: str, default: int) -> int:
            return default if (value := zero.get(name, "auto")) == "auto" else int(value)

        accumulated = config.get("data_types", {}).get("grad_accum_dtype")
        return cls(
            stage=stage,
            offload_optimizer=device["optimizer"] != "none",
            offload_parameters=device["param"] != "none",
            fp32_gradients=stage == 1 and accumulated == "fp32" and device["optimizer"] == "none",
            bucket=size("reduce_bucket_size", cls.bucket),
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            live=size("stage3_max_live_parameters", cls.live),
            prefetch=size("stage3_prefetch_bucket_size", cls.prefetch),
            persistent=size("stage3_param_persistence_threshold", cls.persistent),
        )


@dataclass(frozen=True)
class Choice:
    """Options that a plan may change without changing the result.

    Args:
        micro_batch: records per GPU at a time. accumulation: micro-batches per optimizer step.
        recompute: ``--recompute``.
        bits: of the frozen LLM's weights; 4 changes the results a little, which a suggestion says.
        zero: with the file that asks for it, as given with --deepspeed; None without.
    """

    micro_batch: int
    accumulation: int
    recompute: str
    bits: int
    zero: Zero
    zero_file: str | None = None


@dataclass(frozen=True)
class Pair:
    """Measurements of a run's first steps relative to its plan.

    Args:
        run: its folder. gpu: a key of ``devices.DEVICES``. recompute, bits: of its setting.
        memory: peak reserved by the allocator, as a share of the planned peak.
        outside: bytes of the GPU's memory beyond the allocator's: CUDA's context and NCCL.
        time: seconds of a step, as a share of the planned ones.
    """

    run: str
    gpu: str
    recompute: str
    bits: int
    memory: float
    outside: int
    time: float
