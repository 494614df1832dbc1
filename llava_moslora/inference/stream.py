"""One answer, word by word while it is generated, for the chat and the web page."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llava_moslora.errors import Refusal
from llava_moslora.inference.generate import Question, batch, generate
from llava_moslora.inference.load import ChatModel


def stream(
    chat_model: ChatModel,
    question: Question,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """The answer in pieces; joined they are what :func:`llava_moslora.inference.generate.answer` gives.

    Args:
        temperature: 0: greedy; else answers are sampled, from the smallest set of tokens with probability ``top_p``.

    Raises:
        Refusal: as ``answer`` and :func:`check_sampling`. An iterator that is closed early stops the generation.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    inputs = batch(chat_model, [question])
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}

    @torch.inference_mode()
    def run() -> None:
        try:
            generate(
                chat_model, inputs, max_new_tokens=max_new_tokens, streamer=_NewIds(pieces),
                stopping_criteria=[_StopWhen(stopped)], **sampling,
            )  # fmt: skip
            pieces.put(None)
        except Exception as error:  # whatever it is, it is raised in the thread that waits for the answer
            pieces.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ids: list[int] = []
    shown = ""
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            ids += piece
            text = chat_model.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
            # A character may be several tokens, and white space at the end may be stripped: both wait for more tokens.
            whole = (shown if text.endswith("�") else text).rstrip()
            if len(whole) > len(shown):
                yield whole[len(shown) :]
                shown = whole
        text = chat_model.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if len(text) > len(shown):
            yield text[len(shown) :]
    finally:
        stopped.set()
        thread.join()


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises C-FLAG where one of them is out of its range."""
    for name, value, holds, expected in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 or above"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
    ):
        if not holds:  # also of NaN
            raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=expected)


class _NewIds(BaseStreamer):
    """Puts the ids of every step into a queue, except the first step's, which are the prompt."""

    def __init__(self, pieces: queue.SimpleQueue):
        self.pieces, self.prompt_seen = pieces, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.pieces.put(value.flatten().tolist())
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing to do: ``generate`` returns."""


class _StopWhen(StoppingCriteria):
    """Stops the generation once ``event`` is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
