"""This package's Trainer for pictures: their batches, and no token counts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Trainer

from llava_moslora.diffusion.batches import Pictures
from llava_moslora.training.throughput import Throughput
from llava_moslora.training.trainer import MosLoraTrainer


class SdxlTrainer(MosLoraTrainer):
    """Trains the adapters of :func:`llava_moslora.diffusion.model.add_adapters` on :class:`Pictures`."""

    train_dataset: Pictures

    def prepare_model(self) -> Throughput:
        return Throughput(None, self.args.device)

    def learning_rate_of(self, name: str) -> float:
        mixer_lr = self.args.mixer_lr
        return mixer_lr if "lora_mixer" in name and mixer_lr is not None else self.args.learning_rate

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As :class:`MosLoraTrainer`'s, the pictures of each micro-batch completed by latents and noise."""
        step, ranks, per_device = self.state.global_step, self.args.world_size, self.args.per_device_train_batch_size

        def completed():
            for number, batch in enumerate(epoch_iterator):  # the micro-batches of this step
                records = batch["record"].tolist()
                first = number * per_device * ranks + self.args.process_index  # as in the sampler
                positions = range(first, first + len(records) * ranks, ranks)
                yield batch | self.train_dataset.complete(records, step, positions)

        return super().get_batch_samples(completed(), num_batches, device)

    def count(self, batch: dict, records: list[int]) -> None:
        self.throughput.add([1] * len(records), labels=0, images=0)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # not known

    def _prepare_input(self, data):
        """To the device, in float32: under DeepSpeed the Trainer would round noise and latents to 16 bits."""
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return Trainer._prepare_input(self, data)
