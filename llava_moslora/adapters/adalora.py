"""AdaLoRA's orthogonality term, counted once per optimizer step.

PEFT adds the term to the loss of every micro-batch. Where the loss is a sum over the global batch's tokens, it would
count as often as there are micro-batches, on all ranks together.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.utils.integrations import gather_params_ctx
from torch import Tensor


class AdaLoraOnce(AdaLoraModel):
    """PEFT's model with ``share`` of the term in the loss of a micro-batch, in training only.

    Attributes:
        share: 1 where the loss is averaged over micro-batches and ranks.
        terms: the whole term, float32[], of each micro-batch since :meth:`take_term`.
    """

    share: float
    terms: list[Tensor]

    def forward(self, *args, **kwargs):
        outputs = self.model.forward(*args, **kwargs)
        if self.training and getattr(outputs, "loss", None) is not None:
            term = self.peft_config[self.trainable_adapter_name].orth_reg_weight * self.distance_from_orthogonal()
            self.terms.append(term.detach().float())
            outputs.loss = outputs.loss + self.share * term
        return outputs

    def distance_from_orthogonal(self) -> Tensor:
        """Mean of ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ over all adapted linears (Zhang et al. 2023, equation 4, without the
        square, as PEFT), float[]."""
        distances = []
        for name, parameter in self.model.named_parameters():
            is_a = f".lora_A.{self.trainable_adapter_name}" in name
            if not (is_a or f".lora_B.{self.trainable_adapter_name}" in name):
                continue
            with gather_params_ctx(parameter, fwd_module=self):
                gram = parameter @ parameter.T if is_a else parameter.T @ parameter
            distances.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
        return torch.stack(distances).mean()

    def take_term(self) -> float:
        """Mean of :attr:`terms`, which are forgotten."""
        terms, self.terms = self.terms, []
        return torch.stack(terms).mean().item() if terms else 0.0


def count_once(model: PeftModel, share: float) -> AdaLoraOnce | None:
    """Make an AdaLoRA count its term with ``share``; None for any other model."""
    inner = getattr(model, "base_model", None)
    if not isinstance(inner, AdaLoraModel):
        return None
    inner.__class__ = AdaLoraOnce
    inner.share, inner.terms = share, []
    return inner
