"""What is asked, and what reaches a model: the text, ids, pixels and answers of every call of its ``generate``."""

import hashlib

import torch

from llava_moslora.inference import generate


class Recorder:
    """Watches a :class:`~llava_moslora.inference.load.ChatModel`; ``rows`` has a dict for every question so far."""

    def __init__(self):
        self.rows = []
        self.turns = []

    def answer(self, chat_model, questions, **how):
        """In place of ``generate.answer``: white space at the ends of a turn, say, does not reach the model."""
        self.turns = [turn.text for _, turns in questions for turn in turns]
        return generate.answer(chat_model, questions, **how)

    def watch(self, chat_model):
        inner = chat_model.model.generate

        def recorded(**inputs):
            output = inner(**inputs)
            ids, pixels = inputs["input_ids"], inputs["pixel_values"].to(torch.float32).cpu()
            assert len(ids) == 1, "one question at a time"
            new = output[0, ids.shape[1] :]
            self.rows.append({
                "turns": self.turns,
                "text": chat_model.tokenizer.decode(ids[0]),
                "ids": ids[0].tolist(),
                "images": len(pixels),
                "pixels": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
                "answer": new.tolist(),
            })  # fmt: skip
            return output

        chat_model.model.generate = recorded
        return chat_model
