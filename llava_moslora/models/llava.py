"""LLaVA in training: transformers' model, with the loss computed only at the positions that have a label.

Shapes: B rows of a batch, T tokens, N images, P patches, D LLM width, V vocabulary, S positions with a label in B·T.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from llava_moslora.models.attention import can_omit_mask, empty_mask
from llava_moslora.text.conversation import IGNORE_INDEX

LOSS_CHUNK = 4096  # positions whose logits are in memory at once: at most 5 GiB with LLaMA-3's vocabulary


class Llava(LlavaForConditionalGeneration):
    """``LlavaForConditionalGeneration`` with its own training forward; without ``labels`` it is the stock model."""

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
            labels: int64[B, T], ``IGNORE_INDEX`` where no loss is taken; position t is predicted from t-1.
            label_positions: int64[S], where ``labels`` has one at t > 0, in the flattened B·T. The collator gives them,
                like ``image_positions``; otherwise they are found here, for which the host waits for the device.
            image_positions: int64[N·P], where ``input_ids`` has placeholders, in the flattened B·T.
            position_ids: int64[B, T] of packed rows, from 0 in every record. With them ``kwargs`` has transformers'
                ``cu_seq_lens_q``, ``max_length_q`` (and ``_k``), from which kernels know the records without a mask.
            num_items_in_batch: the number the summed loss is divided by; default: S, a mean over this batch.
            logits_to_keep: without labels, of how many last positions; 0: of all. ``generate`` asks for one, but only
                of a forward that names this argument.

        Returns:
            With labels: an output that holds only ``loss``, float32[]. The logits of all B·T positions are never
            computed: ``lm_head`` gets the S positions with a label, in LLaVA's data a tenth of them.
        """
        if labels is None:
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        embeds = self._embed_inputs(input_ids, pixel_values, image_positions)
        packed = position_ids is not None
        right_padded = attention_mask is None and (not packed or "cu_seq_lens_q" in kwargs)
        if right_padded and can_omit_mask(self.config.text_config, embeds, packed=packed):
            attention_mask = empty_mask(embeds)
        hidden = self.model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **kwargs
        )[0]  # (B, T, D)
        if label_positions is None:
            has_label = F.pad(labels[:, 1:] != IGNORE_INDEX, (1, 0))  # (B, T)
            label_positions = has_label.flatten().nonzero().squeeze(1)
        hidden = hidden.flatten(0, 1).index_select(0, label_positions - 1)  # (S, D)
        targets = labels.flatten().index_select(0, label_positions)  # (S)
        loss = self._summed_loss(hidden, targets)
        loss = loss / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        return LlavaCausalLMOutputWithPast(loss=loss)

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of float[S, D] against int64[S], summed, float32[]. With more than ``LOSS_CHUNK`` positions the
        logits are computed chunk by chunk, and recomputed in backward."""
        # Under ZeRO-3 every rank must run the head equally often, and ranks have different numbers of labels.
        if len(targets) <= LOSS_CHUNK or hasattr(self.lm_head.weight, "ds_id"):
            return self._chunk_loss(hidden, targets)
        chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        return torch.stack([checkpoint(self._chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()

    def _chunk_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.lm_head(hidden)  # (S, V)
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def _embed_inputs(self, input_ids: Tensor, pixel_values: Tensor | None, image_positions: Tensor | None) -> Tensor:
        """Word embeddings float[B, T, D] with the images' features at their placeholders.

        A batch without images runs the same modules, forward and backward, on a blank image whose features are
        appended and cut off again: no value changes, and its gradients are zero. ZeRO-3 gathers parameters by
        collectives and ahead of time, in the order in which modules ran before, so a rank that skips the tower, or runs
        it at another moment, would make all ranks wait for ever.
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
