"""Inits of A, B and W other than LoRA's: :data:`llava_moslora.adapters.config.STARTS`.

Shapes: base weight W₀ (out, in), A (r, in), W (r, r), B (out, r).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from torch import Tensor, nn

if TYPE_CHECKING:
    from llava_moslora.adapters.config import MosLoraConfig

FLORA_STD = 0.02  # of B, as of FLoRA's authors' later toolkit
LORA_XS_STD = 1e-5  # of W (Bałazy et al. 2024, section 3)
# start → tensors that are not trained
FROZEN = {"loraxs": ("lora_A", "lora_B"), "pissa": ("lora_start_A", "lora_start_B")}


@torch.no_grad()
def start(module: Any, adapter: str, config: MosLoraConfig) -> None:
    """Initialise A, B and W of a MosLoraLayer that PEFT has just created, and add PiSSA's frozen pair A₀, B₀.

    A configuration in inference mode belongs to a saved adapter, whose tensors are loaded next: the base weight is then
    not decomposed.
    """
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    w = module.lora_mixer[adapter].weight if adapter in module.lora_mixer else None
    rank, scaling = module.r[adapter], module.scaling[adapter]
    if config.start == "flora":
        assert w is not None
        nn.init.zeros_(w)
        nn.init.normal_(b, std=FLORA_STD)
        return
    if config.start == "pissa":
        with torch.device(a.device):
            module.lora_start_A[adapter] = nn.Linear(a.shape[1], rank, bias=False, dtype=a.dtype)
            module.lora_start_B[adapter] = nn.Linear(rank, len(b), bias=False, dtype=b.dtype)
    if a.is_meta or config.inference_mode:
        return
    base = module.get_base_layer()
    with gather_params_ctx(base.weight):
        weight = dequantize_module_weight(base).detach()
        if config.start == "nlora":
            factors = weight[:rank], weight[:rank, :rank], weight[:, :rank]
        elif config.start == "loraxs":
            u, s, v = top_singular(weight, rank)
            factors = v.T, torch.randn(rank, rank) * LORA_XS_STD, u * s
        else:
            u, s, v = top_singular(weight, rank)
            root = (s / scaling).sqrt()
            factors = root[:, None] * v.T, None, u * root
        for target, value in zip((a, w, b), factors, strict=True):
            if target is not None:
                target.copy_(value)
    if config.start == "pissa":
        module.lora_start_A[adapter].weight.copy_(a)
        module.lora_start_B[adapter].weight.copy_(b)


@torch.no_grad()
def fold_mixer(a: Tensor, w: Tensor) -> None:
    """A ← W·A, in float32."""
    if not (a.is_meta or w.is_meta):
        a.copy_(w.to(a.device, torch.float32) @ a.float())


def top_singular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first ``rank`` singular triples of (out, in): U (out, rank), S (rank) descending, V (in, rank), float64.

    From the eigenvectors of the smaller Gram matrix in float64, which is exact to float32 precision for the largest
    values and takes a fraction of a full SVD's time. On a GPU, if there is one.
    """
    device = "cuda" if torch.cuda.is_available() else weight.device
    exact = weight.to(device, torch.float64)
    wide = len(exact) <= exact.shape[1]
    _, vectors = torch.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)  # ascending
    vectors = vectors[:, -rank:].flip(1)
    others = (exact.T if wide else exact) @ vectors
    values = others.norm(dim=0)
    others = others / values.clamp_min(torch.finfo(torch.float64).tiny)
    return (vectors, values, others) if wide else (others, values, vectors)
