from peft.import_utils import is_bnb_available
from torch import nn

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.layers import MosLoraLinear, UnsupportedModule

if is_bnb_available():  # first, because bitsandbytes' classes inherit from nn.Linear
    from llava_moslora.adapters.bnb import LAYER_CLASSES

    MosLoraConfig.layer_classes |= LAYER_CLASSES
MosLoraConfig.layer_classes |= {nn.Linear: MosLoraLinear, nn.Module: UnsupportedModule}
