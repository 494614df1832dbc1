"""What libraries print on every normal run, and nobody can act on: each line by its logger and its words.

Anything else that a library says is shown. :func:`quiet_libraries` is for scripts, before they import the libraries; a
program that imports this package decides for itself.
"""

from __future__ import annotations

import logging
import warnings
from typing import NamedTuple


class Line(NamedTuple):
    logger: str
    words: str
    why: str


LINES = (
    Line(
        "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community",
        "a faster 4-bit product for CPUs from a package nobody asked for; printed by every import of PEFT",
    ),
    Line(
        "DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator",
        "also without --deepspeed; the training itself prints its device",
    ),
    Line(
        "torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME=",
        "where the CUDA toolkit is installed and no GPU; the training itself prints its device",
    ),
)  # fmt: skip
WARNINGS = (
    # PEFT asks models of transformers 5.23 for the old name of is_activation_checkpointing.
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated and will be removed in v6"),
)


def quiet_libraries() -> None:
    """Leave out :data:`LINES` and :data:`WARNINGS` in this process."""
    for line in LINES:
        logging.getLogger(line.logger).addFilter(_Without(line.words))
    for category, message in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)


class _Without(logging.Filter):
    def __init__(self, words: str):
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()
