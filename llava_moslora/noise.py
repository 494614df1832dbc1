"""What libraries print on every normal run, and nobody can act on: each line by its logger and its words.

Anything else that a library says is shown. :func:`quiet_libraries` is for scripts, before they import the libraries; a
program that imports this package decides for itself.
"""

from __future__ import annotations

import importlib.util
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
    Line(
        "diffusers.loaders.lora_base", "No LoRA keys associated to CLIPTextModel",
        "of every LoRA of the UNet alone; how many of its layers diffusers loaded is counted",
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


def quiet_loading() -> None:
    """Leave out the bars with which transformers and diffusers load the parts of a model, and transformers' report of
    tensors that a model has no use for, in this process. What a model lacks is reported still."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_MissingOnly())
    if importlib.util.find_spec("diffusers") is not None:
        from diffusers.utils import logging as of_diffusers

        of_diffusers.disable_progress_bar()


class _MissingOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or any(word in text for word in ("MISSING", "MISMATCH", "CONVERSION"))


class _Without(logging.Filter):
    def __init__(self, words: str):
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()
