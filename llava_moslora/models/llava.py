"""LLaVA and a text-only LLM in training: transformers' models, with the loss computed only where there are labels.

Shapes: B rows of a batch, T tokens, N images, P patches, D LLM width, V vocabulary, S positions with a label in B·T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.utils import ModelOutput

from llava_moslora.models.attention import can_omit_mask, empty_mask
from llava_moslora.text.conversation import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object  # what LabelledForward stands before; transformers would find its configuration in a common base

LOSS_CHUNK = 4096  # positions whose logits are in memory at once: at most 5 GiB with LLaMA-3's vocabulary


@dataclass
class LossOutput(ModelOutput):
    """What :class:`LabelledForward` returns for a batch with labels.

    Attributes:
        loss: float32[].
        correct: int64[], labels that are the most likely token; only where no gradient is computed.
    """

    loss: Tensor | None = None
    correct: Tensor | None = None


class LabelledForward(_Model):
    """Mixin with the training forward, to precede a transformers model among the bases of a class; without ``labels``
    that model's own forward runs."""

    accepts_loss_kwargs = True  # the Trainer passes num_items_in_batch, the trained tokens of the global batch

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        image_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ):
        """
        Args:
            input_ids: int64[B, T]; each image is a run of ``config.image_token_id``, one per patch.
            pixel_values: float[N, 3, H, W] in the order of the images in ``input_ids``, or None without images.
            attention_mask: int64[B, T], 1 for tokens, 0 for padding; not needed where padding is on the right.
            labels: int64[B, T], ``IGNORE_INDEX`` for positions without loss; position t is predicted from t-1.
            label_positions: int64[S], where ``labels`` has one at t > 0, in the flattened B·T. The collator gives them,
                like ``image_positions``; otherwise they are computed here, which synchronises with the device.
            image_positions: int64[N·P], where ``input_ids`` has placeholders, in the flattened B·T.
            position_ids: int64[B, T] of packed rows, from 0 in every record. With them ``kwargs`` has transformers'
                ``cu_seq_lens_q``, ``max_length_q`` (and ``_k``), from which kernels know the records without a mask.
            num_items_in_batch: the number the summed loss is divided by; default: S, a mean over this batch.
            logits_to_keep: without labels, number of last positions with logits; 0: all. ``generate`` passes 1 if
                forward has this argument.

        Returns:
            With labels: a :class:`LossOutput`. The logits of all B·T positions are never computed: ``lm_head`` gets the
            S positions with a label, in LLaVA's data a tenth of them.
        """
        if labels is None:
            images = {} if pixel_values is None else {"pixel_values": pixel_values}
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                **images,
                **kwargs,
            )
        embeds = self._embed_inputs(input_ids, pixel_values, image_positions)
        packed = position_ids is not None
        right_padded = attention_mask is None and (not packed or "cu_seq_lens_q" in kwargs)
        if right_padded and can_omit_mask(self.config.get_text_config(), embeds, packed=packed):
            attention_mask = empty_mask(embeds)
        hidden = self.model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **kwargs
        )[0]  # (B, T, D)
        if label_positions is None:
            has_label = F.pad(labels[:, 1:] != IGNORE_INDEX, (1, 0))  # (B, T)
            label_positions = has_label.flatten().nonzero().squeeze(1)
        hidden = hidden.flatten(0, 1).index_select(0, label_positions - 1)  # (S, D)
        targets = labels.flatten().index_select(0, label_positions)  # (S)
        loss, correct = self._summed_loss(hidden, targets)
        loss = loss / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        return LossOutput(loss=loss, correct=correct)

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cross entropy of float[S, D] against int64[S], summed, float32[], and as :meth:`_chunk_loss` the labels that
        are predicted. With more than ``LOSS_CHUNK`` positions the logits are computed chunk by chunk, and recomputed in
        backward."""
        # Under ZeRO-3 every rank must run the head equally often, and ranks have different numbers of labels.
        if len(targets) <= LOSS_CHUNK or hasattr(self.lm_head.weight, "ds_id"):
            return self._chunk_loss(hidden, targets)
        chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        sums = [checkpoint(self._chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        losses, correct = zip(*sums, strict=True)
        return torch.stack(losses).sum(), None if correct[0] is None else torch.stack(correct).sum()

    def _chunk_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The summed loss, and without gradients int64[], how many of the targets are the most likely token."""
        logits = self.lm_head(hidden)  # (S, V)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        if torch.is_grad_enabled():
            return loss, None
        return loss, (logits.argmax(-1) == targets).sum()

    def _embed_inputs(self, input_ids: Tensor, pixel_values: Tensor | None, image_positions: Tensor | None) -> Tensor:
        """Word embeddings float[B, T, D] of a batch without images."""
        return self.get_input_embeddings()(input_ids)


class Llava(LabelledForward, LlavaForConditionalGeneration):
    """``LlavaForConditionalGeneration`` with the training forward."""

    def _embed_inputs(self, input_ids: Tensor, pixel_values: Tensor | None, image_positions: Tensor | None) -> Tensor:
        """Word embeddings float[B, T, D] with the images' features at their placeholders.

        A batch without images runs the same modules, forward and backward, on a blank image whose features are
        appended and cut off again: no value changes, and its gradients are zero. ZeRO-3 gathers parameters by
        collectives and ahead of time, in the order in which modules ran before, so a rank that skips the tower, or runs
        it at another moment, would deadlock all ranks.
        """
        embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        blank = pixel_values is None
        if pixel_values is None:
            size = self.config.vision_config.image_size
            pixel_values = embeds.new_zeros(1, 3, size, size)
        pixel_values = pixel_values.to(embeds.device, embeds.dtype)
        features = torch.cat(self.model.get_image_features(pixel_values, return_dict=True).pooler_output)  # (N·P, D)
        features = features.to(embeds.dtype)
        if blank:
            return torch.cat([embeds.flatten(0, 1), features[:0]]).view_as(embeds)
        if image_positions is None:
            image_positions = (input_ids == self.config.image_token_id).flatten().nonzero().squeeze(1)
        assert len(image_positions) == len(features), f"{len(image_positions)} placeholders, {len(features)} features"
        return embeds.flatten(0, 1).index_copy(0, image_positions, features).view_as(embeds)


class TextLlm(LabelledForward):
    """An LLM without a vision tower, with the training forward (:func:`text_llm`)."""


def text_llm(llm: PreTrainedModel) -> TextLlm:
    """``llm``, a causal LM of transformers, with the training forward; nothing is copied. Its class is replaced by a
    subclass of the same name, which PEFT records."""
    stock = type(llm)
    llm.__class__ = type(stock.__name__, (TextLlm, stock), {"__module__": stock.__module__})
    return llm
