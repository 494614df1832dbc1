"""Fine-tune LLaVA-style vision-language models with MoSLoRA, ΔW = B·W·A, in the LLM and in the vision tower.

Importing the package registers the ``MOSLORA`` adapter type with PEFT, so that ``PeftModel.from_pretrained`` reads it.
PEFT, and torch with it, is not imported for that: the type is registered as soon as somebody imports PEFT.
"""

import importlib
import importlib.abc
import sys

from llava_moslora._version import __version__

__all__ = ["MosLoraConfig", "__version__"]

REGISTERS = "llava_moslora.adapters"  # registers MOSLORA when it is imported


def __getattr__(name: str):
    if name == "MosLoraConfig":
        from llava_moslora.adapters.config import MosLoraConfig

        return MosLoraConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Finds PEFT as Python would, and imports ``REGISTERS`` once it has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                sys.meta_path.remove(self)
                execute(module)
                importlib.import_module(REGISTERS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "peft" in sys.modules:
    importlib.import_module(REGISTERS)
else:
    sys.meta_path.insert(0, _AfterPeft())
