"""Hides messages that libraries print on every normal run and that need no action, by logger and text.

All other messages are shown. :func:`quiet_libraries` is for scripts, before they import the libraries; a program that
imports this package decides for itself.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Line(NamedTuple):
    logger: str
    words: str
    why: str


LINES = (
    Line(
        "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community",
        "a faster 4-bit matrix product for CPUs from an optional package; printed by every import of PEFT",
    ),
    Line(
        "DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator",
        "also without --deepspeed; the training itself prints its device",
    ),
    Line(
        "torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME=",
        "where the CUDA toolkit is installed and no GPU; the training itself prints its device",
    ),
    Line(
        "diffusers.loaders.lora_base", "No LoRA keys associated to CLIPTextModel",
        "printed for every UNet-only LoRA; how many of its layers diffusers loaded is checked",
    ),
)  # fmt: skip
WARNINGS = (
    # PEFT asks models of transformers 5.23 for the old name of is_activation_checkpointing.
    (FutureWarning, r"`is_gradient_checkpointing` is deprecated and will be removed in v6"),
    # The old name of activation_checkpointing_enable, which the oldest supported transformers has not.
    (FutureWarning, r"`gradient_checkpointing_enable` is deprecated and will be removed in v6"),
    # Of every kernel; whether products and sums are fused decides about last bits only.
    (UserWarning, r"TRITON_DEFAULT_FP_FUSION is unset"),
)


def quiet_libraries() -> None:
    """Hide :data:`LINES` and :data:`WARNINGS` in this process."""
    for line in LINES:
        logging.getLogger(line.logger).addFilter(_Without(line.words))
    for category, message in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)


def quiet_loading() -> None:
    """Hide transformers' and diffusers' progress bars of loading model parts, in this process."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    if importlib.util.find_spec("diffusers") is not None:
        from diffusers.utils import logging as of_diffusers

        of_diffusers.disable_progress_bar()


@contextmanager
def collected_reports() -> Iterator[list[str]]:
    """Collect transformers' reports of missing and unexpected tensors instead of printing them, for a caller that
    checks them itself."""
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" in (text := record.getMessage()):
            reports.append(text)
            return False
        return True

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield reports
    finally:
        logger.removeFilter(keep)


class _Without(logging.Filter):
    def __init__(self, words: str):
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()
