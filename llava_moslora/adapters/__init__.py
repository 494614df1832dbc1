from peft.import_utils import is_bnb_available
from torch import nn

from llava_moslora.adapters.config import MosLoraConfig
from llava_moslora.adapters.layers import MosLoraLinear, UnsupportedModule

if is_bnb_available():  # first: bitsandbytes' classes inherit from nn.Linear
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from llava_moslora.adapters.bnb import MosLoraLinear4bit, MosLoraLinear8bitLt

    MosLoraConfig.layer_classes |= {Linear4bit: MosLoraLinear4bit, Linear8bitLt: MosLoraLinear8bitLt}
MosLoraConfig.layer_classes |= {nn.Linear: MosLoraLinear, nn.Module: UnsupportedModule}
