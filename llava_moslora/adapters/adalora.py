"""AdaLoRA's orthogonality term, once per optimizer step.

PEFT adds the term only where a ``task_type`` chooses its class for causal LMs, which cannot hold a LLaVA, and there to
the loss of every micro-batch: in a loss that is a sum over the global batch's tokens it would be added once per
micro-batch and rank.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn


class OrthogonalityTerm:
    """Adds the term to the loss that ``model`` returns in training mode.

    Args:
        model: adapted with AdaLoRA.
        share: of the term, for each micro-batch; 1 where the loss is averaged over micro-batches and ranks.
    """

    def __init__(self, model: PeftModel, share: float):
        self.base, self.share = model.get_base_model(), share
        self.adapter = model.active_adapter
        self.weight = model.peft_config[self.adapter].orth_reg_weight
        self.terms: list[Tensor] = []
        self.base.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs, output):
        if module.training and getattr(output, "loss", None) is not None:
            term = self.weight * self.distance_from_orthogonal()
            self.terms.append(term.detach().float())
            output.loss = output.loss + self.share * term
        return output

    def distance_from_orthogonal(self) -> Tensor:
        """Mean of ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ over all adapted linears (Zhang et al. 2023, equation 4, without the
        square, as PEFT), float[]."""
        distances = []
        for name, parameter in self.base.named_parameters():
            is_a = f".lora_A.{self.adapter}" in name
            if not (is_a or f".lora_B.{self.adapter}" in name):
                continue
            with gather_params_ctx(parameter, fwd_module=self.base):
                gram = parameter @ parameter.T if is_a else parameter.T @ parameter
            distances.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
        return torch.stack(distances).mean()

    def take(self) -> float:
        """Mean of the whole term over the micro-batches since the last call."""
        terms, self.terms = self.terms, []
        return torch.stack(terms).mean().item() if terms else 0.0


def is_adalora(model: nn.Module) -> bool:
    return isinstance(getattr(model, "base_model", None), AdaLoraModel)
