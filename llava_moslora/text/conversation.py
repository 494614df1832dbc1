"""A conversation to token ids and labels, made together, piece by piece.

Nothing is found again by re-tokenising: each piece of the template (:mod:`llava_moslora.text.templates`) knows whether
it is trained, so the labels cannot disagree with the ids. Texts that stand next to each other are joined and encoded as
one string; a boundary exists only at a control token, at an image, and where training begins or ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerFast

from llava_moslora.errors import Refusal
from llava_moslora.text.template import SYSTEM, TEXT, Pieces, Template
from llava_moslora.text.templates import (
    TEMPLATES,
    chat_template,
    control_id,
    get_template,
    recognise_template,
    stop_token_ids,
)
from llava_moslora.text.tokenizer import IMAGE_TOKEN, image_token_id, text_encoder

__all__ = [
    "IGNORE_INDEX",
    "TEMPLATES",
    "Encoded",
    "Template",
    "Turn",
    "chat_template",
    "encode",
    "encode_prompt",
    "label_runs",
    "recognise_template",
    "show_labels",
    "stop_token_ids",
]

IGNORE_INDEX = -100  # a label without loss; transformers' value


@dataclass(frozen=True)
class Turn:
    role: Literal["system", "human", "gpt"]
    text: str


@dataclass(frozen=True)
class Encoded:
    """Ids and labels of one conversation, equally long.

    Attributes:
        input_ids: int[T]; one ``<image>`` id per image feature.
        labels: int[T]; the id where it is trained, else ``IGNORE_INDEX``.
        ends: the length after each finished round, where the conversation may be cut.
    """

    input_ids: list[int]
    labels: list[int]
    ends: tuple[int, ...]


IMAGE = object()  # an image's place in the stream of pieces
END = object()  # a round ends here


def encode(
    turns: Sequence[Turn], *, tokenizer: PreTrainedTokenizerFast, template: str, image_tokens: Sequence[int] = ()
) -> Encoded:
    """Ids and labels of a conversation that ends with an answer.

    Args:
        turns: an optional system turn, then human and gpt in turn.
        image_tokens: for each image, in order, the number of placeholders. A conversation with images must have as
            many ``<image>`` in its human turns; without images, ``<image>`` is ordinary text.

    Raises:
        Refusal: D-ROLE (order of turns), D-IMAGES (``<image>`` against images), C-TEMPLATE (template and tokenizer).
    """
    _check_order(turns, last="gpt")
    return _encode(turns, tokenizer, get_template(template, tokenizer), image_tokens, prompt=False)


def encode_prompt(
    turns: Sequence[Turn], *, tokenizer: PreTrainedTokenizerFast, template: str, image_tokens: Sequence[int] = ()
) -> Encoded:
    """As :func:`encode`, of a conversation that ends with a question, ready for generation; no label is trained."""
    _check_order(turns, last="human")
    encoded = _encode(turns, tokenizer, get_template(template, tokenizer), image_tokens, prompt=True)
    return Encoded(encoded.input_ids, [IGNORE_INDEX] * len(encoded.input_ids), encoded.ends)


def _encode(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerFast,
    form: Template,
    image_tokens: Sequence[int],
    prompt: bool,
) -> Encoded:
    places = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "human") if image_tokens else 0
    if places != len(image_tokens):
        raise Refusal(
            "D-IMAGES",
            "the human turns have another number of <image> than there are images",
            found=f"{places} <image>",
            expected=f"{len(image_tokens)} for {len(image_tokens)} images",
        )
    encode_text = text_encoder(tokenizer)
    ids: list[int] = []
    labels: list[int] = []
    ends: list[int] = []
    images = iter(image_tokens)
    image_id = image_token_id(tokenizer) if image_tokens else None
    waiting, waiting_trained, place = "", False, "start"

    def append(more: list[int], trained: bool) -> None:
        ids.extend(more)
        labels.extend(more if trained else [IGNORE_INDEX] * len(more))

    def flush() -> None:
        nonlocal waiting, place
        if waiting:
            append(encode_text(waiting, place), waiting_trained)
            waiting, place = "", "joined"

    for piece, trained in _stream(turns, form, bool(image_tokens), prompt):
        if piece is END:
            flush()
            ends.append(len(ids))
        elif isinstance(piece, str):
            if trained != waiting_trained:
                flush()
            waiting, waiting_trained = waiting + piece, trained
        else:
            if piece is IMAGE:
                more = [image_id] * next(images)
            else:
                found = control_id(piece, tokenizer)
                if found is None:
                    continue
                more = [found]
            flush()
            append(more, trained)
            place = "fresh"
    flush()
    return Encoded(ids, labels, tuple(ends))


def _stream(turns: Sequence[Turn], form: Template, has_images: bool, prompt: bool) -> Iterator[tuple[object, bool]]:
    """The conversation as ``(text | Control | IMAGE | END, trained?)``, slots filled."""
    system = turns[0].text.strip() if turns[0].role == "system" else form.default_system
    if turns[0].role == "system" and not form.system:
        raise Refusal("D-ROLE", "this prompt template has no place for a system turn", found=turns[0].text)
    heading: list[object] = [] if system is None else list(_fill(form.system, [system], []))
    for piece in form.begin:
        yield piece, False
    if SYSTEM not in form.human:
        yield from ((piece, False) for piece in heading)
        heading = []
    for turn in turns:
        if turn.role == "human":
            content = _cut_at_images(turn.text.strip()) if has_images else [turn.text.strip()]
            if form.images_only:
                content = [piece for piece in content if piece is IMAGE]
            yield from ((piece, False) for piece in _fill(form.human, content, heading))
            heading = []
        elif turn.role == "gpt":
            yield from ((piece, False) for piece in form.reply)
            yield from ((piece, True) for piece in _fill(form.answer, [turn.text.strip()], []))
            yield from ((piece, False) for piece in form.separator)
            yield END, False
    if prompt:
        yield from ((piece, False) for piece in form.reply)


def _fill(pieces: Pieces, text: list[object], heading: list[object]) -> Iterator[object]:
    for piece in pieces:
        if piece is TEXT:
            yield from text
        elif piece is SYSTEM:
            yield from heading
        else:
            yield piece


def _cut_at_images(text: str) -> list[object]:
    """``"<image>\\nWhat?"`` to ``[IMAGE, "\\nWhat?"]``."""
    parts: list[object] = []
    for k, plain in enumerate(text.split(IMAGE_TOKEN)):
        parts += ([IMAGE] if k else []) + ([plain] if plain else [])
    return parts


def _check_order(turns: Sequence[Turn], last: str) -> None:
    roles = [turn.role for turn in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("human", "gpt")[k % 2] for k in range(len(body))]
    if not body or body != expected or body[-1] != last:
        raise Refusal(
            "D-ROLE",
            "the turns are not in order",
            found=", ".join(roles) or "no turns",
            expected=f"an optional system turn, then human and gpt in turn, the last one {last}",
        )


def label_runs(
    input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[Literal["image", "masked", "trained"], str]]:
    """A tokenised conversation cut into runs of one kind, decoded; an image's run reads ``<image>×576``."""
    image = tokenizer.added_tokens_encoder.get(IMAGE_TOKEN)
    runs: list[tuple[str, list[int]]] = []
    for token, label in zip(input_ids, labels, strict=True):
        kind = "image" if token == image else "masked" if label == IGNORE_INDEX else "trained"
        if runs and runs[-1][0] == kind:
            runs[-1][1].append(token)
        else:
            runs.append((kind, [token]))
    return [
        (kind, f"{IMAGE_TOKEN}×{len(tokens)}" if kind == "image" else tokenizer.decode(tokens)) for kind, tokens in runs
    ]


def show_labels(encoded: Encoded, tokenizer: PreTrainedTokenizerFast, *, colour: bool = True) -> str:
    """A conversation for the eye: trained text green, or between ⟦ ⟧ without colour."""
    open_, close = ("\x1b[32m", "\x1b[0m") if colour else ("⟦", "⟧")
    runs = label_runs(encoded.input_ids, encoded.labels, tokenizer)
    return "".join(open_ + text + close if kind == "trained" else text for kind, text in runs)
