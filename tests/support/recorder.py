"""What reaches a model: the ids, pixels and answers of every call of its ``generate``."""

import hashlib

import torch


class Recorder:
    """Watches a :class:`~llava_moslora.inference.load.ChatModel`; ``rows`` has a dict for every question so far."""

    def __init__(self):
        self.rows = []

    def watch(self, chat_model):
        generate = chat_model.model.generate

        def recorded(**inputs):
            output = generate(**inputs)
            ids, pixels = inputs["input_ids"], inputs["pixel_values"].to(torch.float32).cpu()
            assert len(ids) == 1, "one question at a time"
            new = output[0, ids.shape[1] :]
            self.rows.append({
                "text": chat_model.tokenizer.decode(ids[0]),
                "ids": ids[0].tolist(),
                "images": len(pixels),
                "pixels": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
                "answer": new.tolist(),
            })  # fmt: skip
            return output

        chat_model.model.generate = recorded
        return chat_model
