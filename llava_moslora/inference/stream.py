"""Streams one answer while it is generated, for the chat and the web page."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from llava_moslora.errors import Refusal
from llava_moslora.inference.generate import Question, batch, generate
from llava_moslora.inference.load import ChatModel
from llava_moslora.models.llm import longest_text


def stream(
    chat_model: ChatModel,
    question: Question,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_seconds: float = math.inf,
    stopped: threading.Event | None = None,
) -> Iterator[str]:
    """The answer in pieces; joined they are what :func:`llava_moslora.inference.generate.answer` gives.

    Args:
        max_new_tokens: fewer if the LLM's context has room for fewer.
        temperature: 0: greedy; else answers are sampled, from the smallest set of tokens with probability ``top_p``.
        max_seconds: the answer ends with the first token after it. stopped: with the first token after it is set.

    Raises:
        Refusal: as ``answer`` and :func:`check_sampling`; D-LENGTH, the prompt does not fit the LLM's context. Closing
            the iterator early stops the generation.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    inputs = batch(chat_model, [question])
    max_new_tokens = min(max_new_tokens, _positions_left(chat_model, inputs["input_ids"].shape[1]))
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    stopped = stopped or threading.Event()
    left = threading.Event()
    deadline = time.monotonic() + max_seconds
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}

    @torch.inference_mode()
    def run() -> None:
        try:
            generate(
                chat_model, inputs, max_new_tokens=max_new_tokens, streamer=_NewIds(pieces),
                stopping_criteria=[_StopWhen(lambda: left.is_set() or stopped.is_set() or time.monotonic() > deadline)],
                **sampling,
            )  # fmt: skip
            pieces.put(None)
        except Exception as error:  # of any kind: re-raised in the thread that waits for the answer
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
        left.set()
        thread.join()


def _positions_left(chat_model: ChatModel, prompt: int) -> int:
    """Context left for the answer to a prompt of ``prompt`` tokens.

    Raises:
        Refusal: D-LENGTH, none.
    """
    if (positions := longest_text(chat_model.model.config.get_text_config())) is None:
        return 2**31
    if prompt >= positions:
        raise Refusal(
            "D-LENGTH", "the conversation is longer than the LLM's context", found=f"{prompt} tokens",
            expected=f"fewer than {positions}", fix="shorten it, or start over",
        )  # fmt: skip
    return positions - prompt


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
    """Stops the generation once ``holds`` returns true."""

    def __init__(self, holds: Callable[[], bool]):
        self.holds = holds

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return torch.full((len(input_ids),), self.holds(), device=input_ids.device)
