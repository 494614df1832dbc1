"""Triton's kernels compiled for GPUs that are not here: they fit the multiprocessor, and nothing spills to memory."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", exc_type=ImportError)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from llava_moslora.adapters import triton_dropout  # noqa: E402
from llava_moslora.models import fused_layers  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Of a multiprocessor: registers, and bytes of shared memory of which a program's own kilobyte is taken
REGISTERS, SHARED = 65536, {75: 65 * 1024, 80: 164 * 1024, 86: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024}


class Compiled:
    """Stands in for a kernel: ``kernel[grid](*arguments)`` compiles it as a launch with these arguments would."""

    def __init__(self, kernel, capability, resources):
        self.kernel, self.capability, self.resources = kernel, capability, resources

    def __getitem__(self, grid):
        return self

    def __call__(self, *values, **named):
        names = self.kernel.arg_names
        options = {name: named.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in named}
        arguments = dict(zip(names, values, strict=False)) | named
        constants = {p.name: arguments[p.name] for p in self.kernel.params if p.is_constexpr}
        pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
        signature = {
            name: "constexpr" if name in constants
            else pointers[value.dtype] if isinstance(value, torch.Tensor)
            else "fp32" if isinstance(value, float) else "i32"
            for name, value in arguments.items()
        }  # fmt: skip
        divisible = {
            (names.index(p.name),): [["tt.divisibility", 16]]
            for p in self.kernel.params
            if signature[p.name].startswith("*")
            or (signature[p.name] == "i32" and not p.do_not_specialize and arguments[p.name] % 16 == 0)
        }
        source = ASTSource(
            self.kernel, {name: signature[name] for name in names},
            {(names.index(name),): value for name, value in constants.items()}, divisible,
        )  # fmt: skip
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        threads = 32 * options.get("num_warps", 4)
        by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
        together = min(by_registers, SHARED[self.capability] // (compiled.metadata.shared + 1024))
        self.resources.append((self.kernel.__name__, stack + local, together))


def launched(monkeypatch, capability, dtype=torch.bfloat16, rank=64):
    """What the package's own launches would take on a GPU: (kernel, bytes spilled, programs at once on one of its
    multiprocessors), for LLaMA-3-8B's shapes."""
    resources = []
    kernels = {
        triton_dropout: ("_project", "_outer", "_add", "_add_dropped"),
        fused_layers: ("_silu_mul", "_silu_mul_backward", "_quick_gelu", "_quick_gelu_backward", "_rotate"),
    }
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Compiled(getattr(module, name), capability, resources))
    x, a, u = (torch.zeros(shape, dtype=dtype) for shape in ((2048, 4096), (rank, 4096), (2048, rank)))
    seed = torch.tensor(2**40 + 5)
    triton_dropout.dropped_project(x, a, seed, 3277)
    triton_dropout.dropped_outer(u, x, seed, 3277)
    triton_dropout.add_low_rank(x, u, a.T.contiguous(), 2.0)
    for count in (1, 2, 3):
        triton_dropout.add_dropped(x, [(u, a, seed, 3277)] * count)
    gate, up = x.clone().requires_grad_(), x.clone().requires_grad_()
    fused_layers._SiluMul.apply(gate, up).sum().backward()
    fused_layers._QuickGelu.apply(gate).sum().backward()
    heads, angles = x.view(1, 2048, 32, 128).transpose(1, 2), torch.empty(1, 2048, 128, dtype=dtype)
    fused_layers._rotated(heads, angles, angles, 1.0)
    return resources


@pytest.mark.parametrize(
    "capability, spilled_at_most",
    [(90, 0), pytest.param(80, 64, marks=pytest.mark.slow), pytest.param(100, 64, marks=pytest.mark.slow)],
)
def test_kernels_fit_and_run_side_by_side(capability, spilled_at_most, monkeypatch):
    resources = launched(monkeypatch, capability)
    assert len(resources) == 11
    at_least = {"_project": 3, "_outer": 4, "_add": 3} if capability == 90 else {}
    for name, spilled, together in resources:
        assert spilled <= spilled_at_most, (name, spilled)
        assert together >= at_least.get(name, 2), (name, together)


@pytest.mark.parametrize("capability", [86, pytest.param(75, marks=pytest.mark.slow)])
def test_float32_fits_smaller_multiprocessors(capability, monkeypatch):
    """Of an RTX 3090, 4090 or 5090 and of a T4; without this a launch fails there."""
    for name, _, together in launched(monkeypatch, capability, torch.float32, rank=512):
        assert together >= 1, name
