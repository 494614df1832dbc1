"""Cost of the adapter compared with PEFT's LoRA: time, FLOPs and bytes saved for backward, in two complete layers.

    python benchmarks/adapter.py [--device cuda] [--repeats 3] [--quick]

Four methods are measured side by side in one run, in a LLaMA decoder layer and a CLIP layer with all linear layers
adapted: frozen layers only, stock PEFT's LoRA, the naive formula x·Aᵀ·Wᵀ·Bᵀ on PEFT's layers, and this package's.
On a GPU the shapes are LLaMA-3-8B's and CLIP-L/336's, the base is in bfloat16, and a fifth method, "torch", is this
package's with plain torch operations instead of Triton's; on a CPU the decoder layer is half as wide.

- time: forward and backward, the best of the repeats, with the methods interleaved. On a CPU it is the processor
  time of one thread, so that other load does not matter.
- FLOPs: torch's counter on meta tensors at LLaMA-3-8B's and CLIP-L/336's shapes and 16,384 rows, minus the frozen
  layer's. What backward recomputes is counted separately.
- bytes: what autograd saves for backward without parameters, each storage counted once, minus the frozen layer's.

It prints one table of ratios to PEFT's LoRA and writes benchmarks/results/adapter-DEVICE.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llava_moslora.adapters import kernel, linear
from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.layers import MosLoraLayer, MosLoraVariant

METHODS = ("frozen", "lora", "naive", "ours")
ON_GPU = (*METHODS, "torch")  # "torch" is "ours" with KERNEL set to that in the environment
KERNEL = "LLAVA_MOSLORA_KERNEL"
RANKS = (64, 512)
DROPOUT = 0.05
LINEARS = {
    "decoder": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "clip": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
HALF = {"hidden_size": 2048, "intermediate_size": 7168, "num_attention_heads": 16, "num_key_value_heads": 4}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
# layer → shape and input (batch, tokens); the FLOPs are counted at about 16,384 rows
SHAPES = {
    "cpu": {"decoder": (HALF, (1, 768)), "clip": (CLIP_L, (1, 577))},
    "cuda": {"decoder": (LLAMA_3_8B, (4, 2048)), "clip": (CLIP_L, (16, 577))},
    "meta": {"decoder": (LLAMA_3_8B, (8, 2048)), "clip": (CLIP_L, (28, 577))},
}
# name → dtype of the base, and whether PEFT upcasts the adapter to fp32, as it does by default
PRECISIONS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "bf16, fp32 adapter": (torch.bfloat16, True),
}


class Decoder(nn.Module):
    def __init__(self, shape: dict):
        super().__init__()
        config = LlamaConfig(**shape, attn_implementation="sdpa")
        self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x):  # (B, T, D) → (B, T, D)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.layer(x, position_ids=positions, position_embeddings=self.rotary(x, positions))


class Clip(nn.Module):
    def __init__(self, shape: dict):
        super().__init__()
        self.layer = CLIPEncoderLayer(CLIPVisionConfig(**shape, attn_implementation="sdpa"))

    def forward(self, x):  # (B, P, E) → (B, P, E)
        return self.layer(x, attention_mask=None)


class Naive(MosLoraVariant):
    """The naive formula, as in the authors' PEFT, instead of the kernel."""

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        a, w, b = module.adapter_weights(active_adapter)
        x = module.lora_dropout[active_adapter](x.to(a.dtype))
        return result + F.linear(F.linear(F.linear(x, a), w), b) * module.scaling[active_adapter]


def build(method: str, layer: str, shape: dict, precision: str, rank: int, device: str) -> nn.Module:
    dtype, upcast = PRECISIONS[precision]
    torch.manual_seed(0)
    with torch.device(device):
        model = {"decoder": Decoder, "clip": Clip}[layer](shape).to(dtype).requires_grad_(False)
        if method == "frozen":
            return model.train()
        settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": DROPOUT, "target_modules": LINEARS[layer]}
        config = LoraConfig(**settings) if method == "lora" else MosLoraConfig(**settings)
        model = get_peft_model(model, config, autocast_adapter_dtype=upcast)
    if method == "naive":
        for module in model.modules():
            if isinstance(module, MosLoraLayer):
                module.lora_variant["default"] = Naive()
                module.fused_base_layers = ()  # the frozen linear is called on its own, as in PEFT
    return model.train()


@contextmanager
def kernel_of(method: str):
    """The environment for a step of ``method``; the adapters read it in every step."""
    before = os.environ.get(KERNEL)
    if method == "torch":
        os.environ[KERNEL] = "torch"
    yield
    os.environ.pop(KERNEL, None)
    if before is not None:
        os.environ[KERNEL] = before


def step(model: nn.Module, x: torch.Tensor, checkpointed: bool) -> None:
    y = checkpoint(model, x, use_reentrant=False, preserve_rng_state=True) if checkpointed else model(x)
    y.backward(torch.ones_like(y))


def seconds(model: nn.Module, x: torch.Tensor, checkpointed: bool) -> float:
    if x.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step(model, x, checkpointed)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.process_time()
    step(model, x, checkpointed)
    return time.process_time() - before


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that autograd keeps for backward, without parameters and the layer's own input."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    for tensor in (*model.parameters(), x):
        storages.pop(tensor.untyped_storage()._cdata, None)
    del y
    return sum(storages.values())


def measure(device: str, layer: str, precision: str, rank: int, checkpointed: bool, repeats: int) -> dict:
    """Method → seconds, and without checkpointing also bytes, minus the frozen layer's."""
    shape, size = SHAPES[device][layer]
    x = torch.randn(*size, shape["hidden_size"], device=device, dtype=PRECISIONS[precision][0], requires_grad=True)
    methods = ON_GPU if device == "cuda" else METHODS
    models = {method: build(method, layer, shape, precision, rank, device) for method in METHODS}
    row = {method: {"seconds": float("inf")} for method in methods}
    for repeat in range(repeats + 1):
        for method in methods:
            with kernel_of(method):
                taken = seconds(models["ours" if method == "torch" else method], x, checkpointed)
            if repeat:  # the first is a warm-up
                row[method]["seconds"] = min(row[method]["seconds"], taken)
    if not checkpointed:
        kept = {method: kept_bytes(model, x) for method, model in models.items()}
        for method in METHODS[1:]:
            row[method]["bytes"] = kept[method] - kept["frozen"]
    return row


def count_flops(layer: str, rank: int) -> dict:
    """Method → FLOPs of the adapters in forward and backward, and how many of this package's are recomputation."""
    shape, size = SHAPES["meta"][layer]
    x = torch.empty(*size, shape["hidden_size"], device="meta", requires_grad=True)
    total = {}
    for method in METHODS:
        model = build(method, layer, shape, "fp32", rank, "meta")
        with FlopCounterMode(display=False) as counter:
            step(model, x, checkpointed=False)
        total[method] = counter.get_total_flops()
    linears = [m for m in model.modules() if isinstance(m, MosLoraLayer)]
    rows = size[0] * size[1]
    recomputed = sum(recomputed_flops(rows, m.in_features, m.out_features, rank) for m in linears)
    flops = {method: {"flops": total[method] - total["frozen"]} for method in METHODS[1:]}
    flops["ours"] = {"flops": flops["ours"]["flops"] - recomputed, "flops_again": recomputed}
    return {"rows": rows, **flops}


def recomputed_flops(rows: int, i: int, o: int, rank: int) -> int:
    """FLOPs that backward spends on recomputing what forward computed: u = D(x)·Aᵀ only if it was not kept."""
    recomputed = kernel.flops(rows, i, o, rank, True)["recomputed"]
    return recomputed - 2 * rows * rank * i * linear.keeps_u(rank, i)


def machine(device: str) -> str:
    """Such as "2-core AMD EPYC CPU" or the GPU's name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{os.cpu_count()}-core {model} CPU"


def targets(device: str, rows: list[dict], flops: list[dict]) -> list[dict]:
    """Each claim with its measurement: the worst of the cases that it covers, as a ratio to PEFT's LoRA."""

    def worst(quantity: str, of: list[dict], **which) -> float:
        fitting = [r for r in of if all(r[key] == value for key, value in which.items())]
        return max(r["ours"][quantity] / r["lora"][quantity] for r in fitting)

    kept = [row for row in rows if not row["checkpointed"]]
    claims = {"adapter FLOPs, LLaMA-3-8B, r 512": (1.015, worst("flops", flops, layer="decoder", rank=512))}
    claims["bytes kept, PEFT's default fp32 adapter"] = (0.25, worst("bytes", kept, precision="bf16, fp32 adapter"))
    if device == "cpu":
        claims["bytes kept, fp32"] = (0.35, worst("bytes", kept, precision="fp32"))
        claims["time, fp32 (an aim)"] = (1.05, worst("seconds", rows, precision="fp32"))
        claims["time, bf16 (an aim)"] = (1.05, worst("seconds", rows, precision="bf16"))
    else:
        claims["bytes kept, bf16"] = (0.42, worst("bytes", kept, precision="bf16"))
        claims["time, decoder, bf16, 8,192 rows"] = (0.8, worst("seconds", kept, precision="bf16", layer="decoder"))
    return [{"what": what, "at_most": bound, "found": round(ratio, 4)} for what, (bound, ratio) in claims.items()]


def cases(ranks: tuple[int, ...], device: str):
    """(layer, precision, rank, checkpointed). fp32 adapters over bf16 are for the bytes, which checkpointing hides; a
    base in fp32 is for the CPU: no GPU trains that."""
    precisions = [name for name, (base, _) in PRECISIONS.items() if device == "cpu" or base != torch.float32]
    for layer, precision, rank in itertools.product(LINEARS, precisions, ranks):
        for checkpointed in (False,) if PRECISIONS[precision][1] else (False, True):
            yield layer, precision, rank, checkpointed


def ratios(row: dict, quantity: str, *methods: str) -> list[float]:
    return [row[method][quantity] / row["lora"][quantity] for method in methods]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=0, help="default: 3 on a CPU, 20 on a GPU")
    parser.add_argument("--quick", action="store_true", help="only rank 64, once; writes nothing")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/adapter-DEVICE.json")
    arguments = parser.parse_args()
    device, ranks = arguments.device, RANKS[:1] if arguments.quick else RANKS
    repeats = 1 if arguments.quick else arguments.repeats or {"cpu": 3, "cuda": 20}[device]
    if device == "cpu":
        torch.set_num_threads(1)

    print(f"{machine(device)}; torch {torch.__version__}, peft {peft.__version__}; ratios to PEFT's LoRA\n")
    timed = ("frozen", "naive", "ours", *["torch"] * (device == "cuda"))
    titles = " ".join(f"{method:>6}" for method in timed)
    print(f"layer   precision             r ckpt | time: {titles} | bytes: naive   ours")
    rows = []
    for layer, precision, rank, checkpointed in cases(ranks, device):
        row = {"layer": layer, "precision": precision, "rank": rank, "checkpointed": checkpointed}
        row |= measure(device, layer, precision, rank, checkpointed, repeats)
        rows.append(row)
        line = f"{layer:7} {precision:18} {rank:4} {'on' if checkpointed else 'off':4} | "
        line += "      " + " ".join(f"{ratio:6.2f}" for ratio in ratios(row, "seconds", *timed)) + " |"
        if not checkpointed:
            line += "{:13.2f} {:6.2f}".format(*ratios(row, "bytes", "naive", "ours"))
        print(line, flush=True)
    print("\nlayer      r   rows | FLOPs: naive    ours  recomputed")
    flops = []
    for layer, rank in itertools.product(LINEARS, RANKS):
        row = {"layer": layer, "rank": rank, **count_flops(layer, rank)}
        flops.append(row)
        again = row["ours"]["flops_again"] / row["lora"]["flops"]
        print(
            f"{layer:7} {rank:4} {row['rows']:6} | "
            + "{:12.4f} {:7.4f}".format(*ratios(row, "flops", "naive", "ours")),
            f"{again:11.4f}",
        )
    if arguments.quick:
        return

    claims = targets(device, rows, flops)
    print("\n" + "\n".join("{what}: {found:.3f} × PEFT's LoRA, at most {at_most}".format(**p) for p in claims))
    result = {
        "machine": machine(device),
        "versions": {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__},
        "repeats": repeats,
        "targets": claims,
        "shapes": {layer: {"shape": shape, "input": size} for layer, (shape, size) in SHAPES[device].items()},
        "layers": rows,
        "flops": flops,
    }
    file = arguments.output or Path(__file__).parent / "results" / f"adapter-{device}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
