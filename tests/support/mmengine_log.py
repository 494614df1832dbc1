"""A torch file as XTuner's trainer writes it: the weights, and mmengine's log as objects of a class of its own."""

import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch


def save_with_log(tensors: dict, file: Path) -> None:
    """``iter_N.pth``; the log's class is gone from ``sys.modules`` afterwards, as where mmengine is not installed."""

    class HistoryBuffer:
        def __init__(self):
            self.values = np.arange(4.0)
            self.last = np.float64(3)

    module = ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    log = {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": OrderedDict(iter=2181)}
    with pytest.MonkeyPatch.context() as patched:
        for name in ("mmengine", "mmengine.logging"):
            patched.setitem(sys.modules, name, ModuleType(name))
        patched.setitem(sys.modules, module.__name__, module)
        torch.save({"meta": {"seed": 1}, "state_dict": tensors, "message_hub": log}, file)
