"""Fine-tune LLaVA-style vision-language models with MoSLoRA, ΔW = B·W·A, in the LLM and in the vision tower.

Importing the package registers the ``MOSLORA`` adapter type with PEFT, so that ``PeftModel.from_pretrained`` reads it.
"""

from llava_moslora._version import __version__
from llava_moslora.adapters.config import MosLoraConfig

__all__ = ["MosLoraConfig", "__version__"]
