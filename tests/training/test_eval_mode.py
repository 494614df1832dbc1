"""Evaluating in the middle of training leaves no trace in the model's modes or the random generators."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from llava_moslora.training.eval_mode import eval_mode


def test_every_module_and_generator_is_as_before():
    """Also where parts were in eval mode, and where it ends with an error."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)))
    model[1][0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(3).tolist(), random.random(), float(np.random.rand())
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        torch.rand(5), random.random(), np.random.rand()
        raise KeyError
    assert [module.training for module in model.modules()] == modes and modes.count(False) == 1
    assert (torch.rand(3).tolist(), random.random(), float(np.random.rand())) == expected
