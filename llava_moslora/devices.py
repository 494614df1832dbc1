"""GPU specifications from the vendors' data sheets, and GPU names on the command line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

GIB = 2**30
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # in the environment; torch reads either


@dataclass(frozen=True)
class Device:
    """
    Args:
        flops: dense 16-bit tensor-core FLOP/s with float32 accumulation.
        memory: GiB that torch sees as the device's total, where it is known (H100: 79.1), else the data sheet's.
        link: bytes/s between GPUs of a host in one direction, per GPU: NVLink, or PCIe where there is none.
        capability: CUDA's compute capability, on which the workspaces of cuBLAS depend.
    """

    flops: float
    memory: float
    link: float
    capability: tuple[int, int] = (8, 0)


# The first name that occurs in the device's own name, as whole words, counts, so longer names come first.
DEVICES = {
    "GH200": Device(989e12, 94.5, 450e9, (9, 0)),
    "H200": Device(989e12, 139.8, 450e9, (9, 0)),
    "H100 PCIe": Device(756e12, 79.1, 300e9, (9, 0)),
    "H100 NVL": Device(835e12, 93.1, 300e9, (9, 0)),
    "H100L": Device(835e12, 93.1, 300e9, (9, 0)),
    "H100": Device(989e12, 79.1, 450e9, (9, 0)),
    "H800": Device(989e12, 79.1, 200e9, (9, 0)),
    "GB200": Device(2500e12, 173.0, 900e9, (10, 0)),
    "B200": Device(2250e12, 178.0, 900e9, (10, 0)),
    "A100-SXM4-40GB": Device(312e12, 39.4, 300e9),
    "A100-PCIE-40GB": Device(312e12, 39.4, 32e9),
    "A100X": Device(312e12, 79.1, 300e9),
    "A100": Device(312e12, 79.1, 300e9),
    "A800": Device(312e12, 79.1, 200e9),
    "L40S": Device(362e12, 44.4, 32e9, (8, 9)),
    "L40": Device(181e12, 44.4, 32e9, (8, 9)),
    "L4": Device(121e12, 22.0, 32e9, (8, 9)),
    "A40": Device(149.7e12, 44.4, 56e9, (8, 6)),
    "A10G": Device(70e12, 22.0, 32e9, (8, 6)),
    "A10": Device(125e12, 22.0, 32e9, (8, 6)),
    "RTX 4090": Device(165.2e12, 23.5, 32e9, (8, 9)),
    "RTX 3090": Device(71e12, 23.5, 56e9, (8, 6)),
    "RTX A6000": Device(154.8e12, 47.4, 56e9, (8, 6)),
    "RTX 6000 Ada": Device(364e12, 47.4, 32e9, (8, 9)),
    "V100S": Device(130e12, 31.7, 32e9, (7, 0)),
    "V100": Device(125e12, 31.7, 150e9, (7, 0)),
    "MI300X": Device(1307e12, 191.0, 448e9, (9, 4)),
    "MI250X": Device(383e12, 63.9, 100e9, (9, 0)),
    "MI250": Device(383e12, 63.9, 100e9, (9, 0)),
}
# --gpu's names → those above
COMMAND_LINE = {
    "gh200-96": "GH200", "h200": "H200", "h100-80": "H100", "h100-pcie": "H100 PCIe", "h100-nvl": "H100 NVL",
    "h800": "H800", "b200": "B200", "a100-80": "A100", "a100-40": "A100-SXM4-40GB", "a800": "A800", "l40s": "L40S",
    "l40": "L40", "l4": "L4", "a40": "A40", "a10": "A10", "a10g": "A10G", "rtx4090": "RTX 4090", "rtx3090": "RTX 3090",
    "a6000": "RTX A6000", "rtx6000ada": "RTX 6000 Ada", "v100-32": "V100", "mi300x": "MI300X", "mi250": "MI250",
}  # fmt: skip


def known_name(name: str) -> str | None:
    """The key of :data:`DEVICES` for a driver's name such as "NVIDIA H100 80GB HBM3"; None where it is not known. An
    "RTX A1000" is no A100."""
    return next((key for key in DEVICES if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", name)), None)


def find_device(name: str) -> Device | None:
    """The device with a driver's name; None if it is not known."""
    key = known_name(name)
    return None if key is None else DEVICES[key]


def use_expandable_segments() -> None:
    """Let torch's allocator grow its segments, unless the environment configures it. To be called before CUDA starts.

    Batches of different lengths fragment segments of a fixed size: on an H100 with 79 GiB, a run that allocates 68 GiB
    can run out of memory. The planner assumes expandable segments too (planning/memory.py).
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
