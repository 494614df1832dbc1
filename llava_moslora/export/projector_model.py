"""A projector as a transformers model. This file is copied next to exported projectors, for XTuner and VLMEvalKit.

It imports nothing of the package that wrote it. Shapes: E vision width, D LLM width.
"""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN


class ProjectorConfig(PretrainedConfig):
    model_type = "projector"

    def __init__(
        self,
        visual_hidden_size=4096,
        llm_hidden_size=4096,
        depth=2,
        hidden_act="gelu",
        bias=True,
        **kwargs,
    ):
        self.visual_hidden_size = visual_hidden_size
        self.llm_hidden_size = llm_hidden_size
        self.depth = depth
        self.hidden_act = hidden_act
        self.bias = bias
        super().__init__(**kwargs)


class ProjectorModel(PreTrainedModel):
    """float[…, E] → float[…, D]: ``depth`` linear layers with an activation between them."""

    config_class = ProjectorConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, config):
        super().__init__(config)
        layers = [nn.Linear(config.visual_hidden_size, config.llm_hidden_size, bias=config.bias)]
        for _ in range(1, config.depth):
            layers += [
                ACT2FN[config.hidden_act],
                nn.Linear(config.llm_hidden_size, config.llm_hidden_size, config.bias),
            ]
        self.model = nn.Sequential(*layers)
        self.post_init()

    def forward(self, features):
        return self.model(features)
