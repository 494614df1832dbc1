"""How fast a run is: tokens and records per second, the share of the device's peak that it uses, and its memory.

Shapes: B lines, T tokens, N images.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from llava_moslora.models.assemble import parameter_size, tokens_per_image
from llava_moslora.models.names import part_of
from llava_moslora.models.towers import kind_of
from llava_moslora.text.conversation import IGNORE_INDEX

# Dense 16-bit tensor-core FLOP/s with float32 accumulation, from the makers' data sheets; the first name found in
# the device's name counts.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250": 383e12,
}


def peak_of(device: torch.device) -> float | None:
    """FLOP/s of a device at its best, None where it is not known (a CPU among them)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations that training one token or image asks for, a multiplication and an addition being
    two. What gradient checkpointing computes again is not counted, nor what padding costs: it is the model's work, as
    in the MFU of PaLM (Chowdhery et al. 2022, appendix B), whose attention term is not halved for causality either.

    Args:
        token: per token in the LLM, attention apart.
        pair: per token and earlier or later token of the same record: attention.
        trained_token: per token with a label: the LM head.
        image: per image: vision tower and projector.
    """

    token: float
    pair: float
    trained_token: float
    image: float

    @classmethod
    def of(cls, model: nn.Module) -> Flops:
        """Counted from the model's parameters: twice a weight forward, twice for the gradient of its input, twice for
        its own if it is trained. Nothing goes backward through a vision tower without adapters."""
        config = model.config
        text, vision = config.text_config, config.vision_config
        work = dict.fromkeys(("llm", "vision_tower", "projector", "lm_head"), 0.0)
        adapted = any(p.requires_grad for name, p in model.named_parameters() if part_of(name) == "vision_tower")
        for name, parameter in model.named_parameters():
            part = part_of(name)
            if len(getattr(parameter, "ds_shape", parameter.shape)) < 2 or "original_module" in name:
                continue  # norms and biases: no product of matrices
            if "embed" in name and "patch" not in name:
                continue  # looked up
            passes = 2 + 2 * parameter.requires_grad
            if (part != "vision_tower" or adapted) and not (part == "projector" and not adapted and "linear_1" in name):
                passes += 2 if "patch_embedding" not in name else 0
            work[part] += passes * parameter_size(parameter)
        if not work["lm_head"]:  # the word embeddings again, counted above as looked up
            work["lm_head"] = 4.0 * parameter_size(model.get_output_embeddings().weight)
        patches = tokens_per_image(vision)
        seen = patches + kind_of(vision).class_tokens  # which the projector does not see
        layers = config.vision_feature_layer
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        tower_attention = (12 if adapted else 4) * layers * vision.hidden_size * seen**2
        return cls(
            token=work["llm"],
            pair=12 * text.num_hidden_layers * text.num_attention_heads * head,
            trained_token=work["lm_head"],
            image=work["vision_tower"] * seen + tower_attention + work["projector"] * patches,
        )


class Throughput:
    """Counts what this rank trains on; :meth:`figures` tells how fast all ranks were since it was last asked."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.flops, self.device, self.peak = Flops.of(model), device, peak_of(device)
        self._begin()

    def _begin(self) -> None:
        self.counted = {"tokens": 0, "samples": 0, "flops": 0.0}
        self.since = time.monotonic()

    def count(self, batch: dict[str, Tensor]) -> None:
        """A micro-batch as :class:`~llava_moslora.data.collate.Collator` makes it, still on the CPU."""
        lengths = batch["lengths"]
        tokens, images = int(lengths.sum()), len(batch.get("pixel_values", ()))
        trained = int((batch["labels"] != IGNORE_INDEX).sum())
        per = self.flops
        self.counted["tokens"] += tokens
        self.counted["samples"] += len(lengths)
        self.counted["flops"] += per.token * tokens + per.pair * int((lengths**2).sum())
        self.counted["flops"] += per.trained_token * trained + per.image * images

    def figures(self) -> dict[str, float]:
        """``tokens_per_second`` (padding not counted) and ``samples_per_second`` of all ranks; ``mfu``, the share of
        the devices' peak, where that is known; on a GPU ``peak_memory_gib`` of the rank that needs most. Collective."""
        seconds = max(time.monotonic() - self.since, 1e-9)
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        ranks = [[*self.counted.values(), memory]]
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            mine = torch.tensor(ranks[0], dtype=torch.float64, device=self.device)
            everyones = mine.new_empty(distributed.get_world_size(), len(mine))
            distributed.all_gather(list(everyones), mine)
            ranks = everyones.tolist()
        tokens, samples, flops, _ = map(sum, zip(*ranks, strict=True))
        memory = max(rank[-1] for rank in ranks)
        self._begin()
        found = {"tokens_per_second": round(tokens / seconds, 1), "samples_per_second": round(samples / seconds, 3)}
        if self.peak is not None:
            found["mfu"] = round(flops / seconds / (self.peak * len(ranks)), 4)
        if memory:
            found["peak_memory_gib"] = round(memory, 2)
        return found
