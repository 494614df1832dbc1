"""LLaVA as it is trained here: transformers' model, with the loss computed only where it counts.

Shapes: B batch, T tokens, N images, P patches, D LLM width, V vocabulary, S supervised positions of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from llava_moslora.models.attention import needs_no_mask, no_mask
from llava_moslora.text.conversation import IGNORE_INDEX

LOSS_ROWS = 4096  # supervised positions whose logits are made at once: 5 GiB at most, with LLaMA-3's vocabulary


class Llava(LlavaForConditionalGeneration):
    """``LlavaForConditionalGeneration`` with its own training forward; without ``labels`` it is the stock model."""

    accepts_loss_kwargs = True  # the Trainer hands us the global batch's supervised-token count

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
        **kwargs,
    ):
        """
        Args:
            input_ids: int64[B, T]; each image is a run of ``config.image_token_id``, one per patch.
            pixel_values: float[N, 3, H, W] in the order of the images in ``input_ids``, or None without images.
            attention_mask: int64[B, T], 1 for tokens, 0 for padding; not needed where padding is on the right.
            labels: int64[B, T], ``IGNORE_INDEX`` where no loss is taken; position t is predicted from t-1.
            label_positions: int64[S], where ``labels`` has one at t > 0, in the flattened B·T. Given, like
                ``image_positions``, by the collator; found here otherwise, for which the host waits for the device.
            image_positions: int64[N·P], where ``input_ids`` has placeholders, in the flattened B·T.
            position_ids: int64[B, T] of packed lines, from 0 in every record. With them ``kwargs`` has transformers'
                ``cu_seq_lens_q``, ``max_length_q`` (and ``_k``), by which kernels find the records without a mask.
            num_items_in_batch: the number the summed loss is divided by; default: S, a mean over this batch.

        Returns:
            With labels: an output that holds only ``loss``, float32[]. The logits of a batch are never made whole:
            ``lm_head`` sees the S supervised positions, which for LLaVA's data is a tenth of B×T.
        """
        if labels is None:
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
        embeds = self._embed(input_ids, pixel_values, image_positions)
        packed = position_ids is not None
        told = attention_mask is None and (not packed or "cu_seq_lens_q" in kwargs)
        if told and needs_no_mask(self.config.text_config, embeds, packed=packed):
            attention_mask = no_mask(embeds)
        hidden = self.model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **kwargs
        )[0]  # (B, T, D)
        if label_positions is None:
            trained = F.pad(labels[:, 1:] != IGNORE_INDEX, (1, 0))  # (B, T)
            label_positions = trained.flatten().nonzero().squeeze(1)
        hidden = hidden.flatten(0, 1).index_select(0, label_positions - 1)  # (S, D)
        targets = labels.flatten().index_select(0, label_positions)  # (S)
        loss = self._summed_loss(hidden, targets)
        loss = loss / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        return LlavaCausalLMOutputWithPast(loss=loss)

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of float[S, D] against int64[S], summed, float32[]; the logits of more than ``LOSS_ROWS``
        positions are made piece by piece, and again in backward."""
        # Under ZeRO-3 every rank must run the head as often as the others, and they have different numbers of labels.
        if len(targets) <= LOSS_ROWS or hasattr(self.lm_head.weight, "ds_id"):
            return self._piece_of_loss(hidden, targets)
        pieces = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        return torch.stack([checkpoint(self._piece_of_loss, *piece, use_reentrant=False) for piece in pieces]).sum()

    def _piece_of_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(hidden)  # (S, V)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_positions: Tensor | None) -> Tensor:
        """Word embeddings float[B, T, D] with the images' features in their places.

        A batch without images takes the same steps, forward and backward, with a blank image whose features are
        appended and cut off again: no value changes and zeros go backward. ZeRO-3 gathers parameters by collectives
        and ahead of time, in the order in which modules ran before, so a rank that skips the tower, or only runs it at
        another moment, would leave all of them waiting for ever.
        """
        embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        blank = pixel_values is None
        if blank:
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
