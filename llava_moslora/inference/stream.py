"""One answer, word by word while it is generated; chat and the web page show it so."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llava_moslora.errors import Refusal
from llava_moslora.inference.generate import Question, batch
from llava_moslora.inference.load import ChatModel
from llava_moslora.text.templates import stop_token_ids


def stream(
    chat_model: ChatModel,
    question: Question,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """The answer in pieces, which joined are what :func:`llava_moslora.inference.generate.answer` gives.

    Args:
        temperature: 0: greedy; else sampled at it, from the smallest set of tokens of probability ``top_p``.

    Raises:
        Refusal: as ``answer`` and :func:`check_sampling`. An iterator that is closed early stops the generation.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    inputs = batch(chat_model, [question])
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}

    @torch.inference_mode()
    def generate() -> None:
        try:
            chat_model.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_token_ids(chat_model.tokenizer, chat_model.template),
                pad_token_id=chat_model.tokenizer.pad_token_id,
                streamer=_Pieces(pieces),
                stopping_criteria=[_When(stopped)],
                **sampling,
            )
            pieces.put(None)
        except Exception as error:  # of the other thread: handed over, whatever it is
            pieces.put(error)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    ids: list[int] = []
    said = ""
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            ids += piece
            text = chat_model.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
            # A character may be several tokens, and white space at the end may be the end: both wait for what follows.
            whole = text if not text.endswith("�") else said
            whole = whole.rstrip()
            if len(whole) > len(said):
                yield whole[len(said) :]
                said = whole
        text = chat_model.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if len(text) > len(said):
            yield text[len(said) :]
    finally:
        stopped.set()
        thread.join()


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """
    Raises:
        Refusal: C-FLAG, one of them is out of its range.
    """
    for name, value, holds, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or above"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
    ):
        if not holds:  # also of NaN
            raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=expected)


class _Pieces(BaseStreamer):
    """Hands on the ids of every step but the first, which is the prompt."""

    def __init__(self, pieces: queue.SimpleQueue):
        self.pieces, self.prompt_seen = pieces, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.pieces.put(value.flatten().tolist())
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing: the end is known when ``generate`` returns."""


class _When(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
