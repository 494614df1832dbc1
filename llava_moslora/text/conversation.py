"""Encodes a conversation as token ids and labels.

Each segment of the template (:mod:`llava_moslora.text.template`) is either trained or not, so ids and labels are
produced together and cannot disagree. Adjacent texts are joined and encoded as one string, except across a control
token, an image, or a boundary between trained and untrained text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Literal
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llava_moslora.errors import Refusal
from llava_moslora.text.template import SYSTEM, TEXT, Segments
from llava_moslora.text.templates import chat_template, control_id, get_template
from llava_moslora.text.tokenizer import IMAGE_TOKEN, image_token_id

IGNORE_INDEX = -100  # a label that is ignored by the loss; transformers' value
IMAGE = object()  # the segment of an image
END = object()  # the segment that marks the end of a round


@dataclass(frozen=True)
class Turn:
    role: Literal["system", "human", "gpt"]
    text: str
    trained: bool = True  # for gpt turns: whether the answer has labels


@dataclass(frozen=True)
class Encoded:
    """One encoded conversation of T tokens."""

    input_ids: list[int]  # int[T]; one <image> id per image feature
    labels: list[int]  # int[T]; the id where it is trained, else IGNORE_INDEX
    ends: tuple[int, ...]  # the length after each finished round, where the conversation may be cut


def encode(
    turns: Sequence[Turn], *, tokenizer: PreTrainedTokenizerFast, template: str, image_tokens: Sequence[int] = ()
) -> Encoded:
    """As :meth:`ConversationEncoder.encode`, of one conversation."""
    return ConversationEncoder(tokenizer, template).encode(turns, image_tokens)


def encode_prompt(
    turns: Sequence[Turn], *, tokenizer: PreTrainedTokenizerFast, template: str, image_tokens: Sequence[int] = ()
) -> Encoded:
    """As :meth:`ConversationEncoder.encode_prompt`, of one conversation."""
    return ConversationEncoder(tokenizer, template).encode_prompt(turns, image_tokens)


class ConversationEncoder:
    """Encodes conversations with one tokenizer and one template.

    Raises:
        Refusal: C-TEMPLATE, no such template; here and in its methods, a template that does not fit the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str):
        self.tokenizer, self.template = tokenizer, get_template(template, tokenizer)
        self._encode_text = text_encoder(tokenizer)
        # Looked up when needed: not all of them have to exist
        self._control_id = cache(partial(control_id, tokenizer=tokenizer))

    @cached_property
    def _image_id(self) -> int:
        return image_token_id(self.tokenizer)

    def encode(
        self, turns: Sequence[Turn], image_tokens: Sequence[int] = (), *, train_on_prompt: bool = False
    ) -> Encoded:
        """Ids and labels of a conversation that ends with an answer.

        Args:
            turns: an optional system turn, then human and gpt in turn.
            image_tokens: for each image, in order, the number of placeholders. A conversation with images must have as
                many ``<image>`` in its human turns; without images, ``<image>`` is ordinary text.
            train_on_prompt: every token but the first has a label, but for rounds whose answer is not trained; without
                images. Question and answer are then one text to the tokenizer.

        Raises:
            Refusal: D-ROLE (order of turns), D-IMAGES (``<image>`` against images), D-CONTROL, C-TEMPLATE.
        """
        check_order(turns, last="gpt")
        encoded = self._encode(turns, image_tokens, prompt=False, train_all=train_on_prompt)
        encoded.labels[0] = IGNORE_INDEX  # no token precedes it; in a packed row it would be another record's
        begin = 0
        for end, turn in zip(encoded.ends, (turn for turn in turns if turn.role == "gpt"), strict=True):
            if not turn.trained:  # the same ids as if it were trained; only the answer of a round has labels
                encoded.labels[begin:end] = [IGNORE_INDEX] * (end - begin)
            begin = end
        return encoded

    def encode_prompt(self, turns: Sequence[Turn], image_tokens: Sequence[int] = ()) -> Encoded:
        """As :meth:`encode`, for a conversation that ends with a question, ready for generation; nothing is trained."""
        check_order(turns, last="human")
        encoded = self._encode(turns, image_tokens, prompt=True)
        return Encoded(encoded.input_ids, [IGNORE_INDEX] * len(encoded.input_ids), encoded.ends)

    def _encode(
        self, turns: Sequence[Turn], image_tokens: Sequence[int], prompt: bool, train_all: bool = False
    ) -> Encoded:
        places = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "human") if image_tokens else 0
        if places != len(image_tokens):
            what = "the number of <image> in the human turns differs from the number of images"
            expected = f"{len(image_tokens)} for {len(image_tokens)} images"
            fix = "put <image> into a human turn, once for each image"
            raise Refusal("D-IMAGES", what, found=f"{places} <image>", expected=expected, fix=fix)
        ids: list[int] = []
        labels: list[int] = []
        ends: list[int] = []
        images = iter(image_tokens)
        pending, pending_trained, place = "", False, "start"  # text that is not encoded yet

        def append(more: list[int], trained: bool) -> None:
            ids.extend(more)
            labels.extend(more if trained else [IGNORE_INDEX] * len(more))

        def flush() -> None:
            nonlocal pending, place
            if pending:
                append(self._encode_text(pending, place), pending_trained)
                pending, place = "", "joined"

        for segment, in_answer in self._segments(turns, bool(image_tokens), prompt):
            trained = in_answer or train_all
            if segment is END:
                flush()
                ends.append(len(ids))
            elif isinstance(segment, str):
                if trained != pending_trained:
                    flush()
                pending, pending_trained = pending + segment, trained
            else:
                token, count = (self._image_id, next(images)) if segment is IMAGE else (self._control_id(segment), 1)
                if token is not None:
                    flush()
                    append([token] * count, trained)
                    place = "fresh"
        flush()
        return Encoded(ids, labels, tuple(ends))

    def _segments(self, turns: Sequence[Turn], has_images: bool, prompt: bool) -> Iterator[tuple[object, bool]]:
        """Yields ``(str | Control | IMAGE | END, trained?)``; the template's variables are replaced by their values."""
        template = self.template
        said = [turn.text if template.keeps_space else turn.text.strip() for turn in turns]
        system = said[0] if turns[0].role == "system" else template.default_system
        if turns[0].role == "system" and not template.system:
            what, fix = "this prompt template has no system turn", "remove the turn, or use another --version"
            raise Refusal("D-ROLE", what, found=turns[0].text, fix=fix)
        if template.one_round and sum(turn.role == "human" for turn in turns) > 1:
            fix = "use records of one round, or another --version; in a chat, /clear"
            raise Refusal("D-ROLE", "this prompt template has only one round", found=f"{len(turns)} turns", fix=fix)
        heading: list[object] = [] if system is None else list(_fill(template.system, [system], []))
        for segment in template.begin:
            yield segment, False
        if SYSTEM not in template.human:
            yield from ((segment, False) for segment in heading)
            heading = []
        for turn, text in zip(turns, said, strict=True):
            if turn.role == "human":
                content: list[object] = _split_at_images(text) if has_images else [text]
                if template.images_only:
                    content = [part for part in content if part is IMAGE]
                yield from ((segment, False) for segment in _fill(template.human, content, heading))
                heading = []
            elif turn.role == "gpt":
                yield from ((segment, False) for segment in template.reply)
                yield from ((segment, True) for segment in _fill(template.answer, [text], []))
                yield from ((segment, False) for segment in template.separator)
                yield END, False
        if prompt:
            yield from ((segment, False) for segment in template.reply)


def _fill(segments: Segments, text: list[object], system: list[object]) -> Iterator[object]:
    """``segments`` with the variables replaced by their values."""
    for segment in segments:
        if segment is TEXT:
            yield from text
        elif segment is SYSTEM:
            yield from system
        else:
            yield segment


def _split_at_images(text: str) -> list[object]:
    """``"<image>\\nWhat?"`` to ``[IMAGE, "\\nWhat?"]``."""
    parts: list[object] = []
    for k, plain in enumerate(text.split(IMAGE_TOKEN)):
        parts += ([IMAGE] if k else []) + ([plain] if plain else [])
    return parts


def check_order(turns: Sequence[Turn], last: str, key: str | None = None) -> None:
    """Refuse (D-ROLE) turns that are not in order; ``last`` is the role of the last one, ``key`` their JSON key."""
    roles = [turn.role for turn in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("human", "gpt")[k % 2] for k in range(len(body))]
    if not body or body != expected or body[-1] != last:
        raise Refusal(
            "D-ROLE", "the turns are not in order", key=key, found=", ".join(roles) or "no turns",
            expected=f"an optional system turn, then human (user) and gpt (assistant) in turn, ending with {last}",
            fix="reorder the turns, or remove the record",
        )  # fmt: skip


def label_runs(
    input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[str, str]]:
    """A tokenised conversation, decoded, as runs of ``"image"``, ``"masked"`` (not trained) or ``"trained"`` tokens.

    The text of an image is ``<image>×576``.
    """
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


def check_template(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """Check that :func:`encode_prompt` gives the ids that the stock tokenizer gives with the exported chat template.

    Raises:
        Refusal: C-TEMPLATE
    """
    images = [1] if IMAGE_TOKEN in tokenizer.added_tokens_encoder else []  # a text-only LLM has no such token
    question = f"{IMAGE_TOKEN}\nWhat is this?" if images else "What is this?"
    turns = [Turn("human", question), Turn("gpt", "A cat."), Turn("human", "Sure?")]
    if template == "plain" or get_template(template, tokenizer).one_round:
        turns = turns[:1]
    ours = encode_prompt(turns, tokenizer=tokenizer, template=template, image_tokens=images).input_ids
    roles = {"human": "user", "gpt": "assistant"}
    text = tokenizer.apply_chat_template(
        [{"role": roles[turn.role], "content": turn.text} for turn in turns],
        chat_template=chat_template(template, tokenizer),
        add_generation_prompt=True,
        tokenize=False,
    )
    stock = tokenizer(text, add_special_tokens=False).input_ids
    if ours != stock:
        at = next((k for k, (a, b) in enumerate(zip(ours, stock, strict=False)) if a != b), min(len(ours), len(stock)))
        what = f"the tokenizer tokenises the {template} prompt differently from token {at} on"
        found, expected = tokenizer.decode(stock[at : at + 5]), tokenizer.decode(ours[at : at + 5])
        raise Refusal("C-TEMPLATE", what, found=found, expected=expected)


class TextEncoder:
    """Plain text to ids, among which no control token can appear.

    A text is tokenised as the stock tokenizer would tokenise it at that position in a prompt. The position matters only
    for tokenizers that put a space before the text (SentencePiece's dummy prefix):

    * ``start``: nothing before it,
    * ``fresh``: after a control token or an image,
    * ``joined``: directly after other text, which was encoded separately because training begins here.

    Attributes:
        controls: name by id of every control token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer
        self.controls = {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        parts = [json.loads(part.__getstate__()) for part in (backend.normalizer, backend.pre_tokenizer) if part]
        kinds = {kind for part in parts for kind in _prefixes(part)}
        joined = _without_prefix(backend) if kinds else backend
        self._at = {"start": backend, "fresh": joined if kinds == {"first"} else backend, "joined": joined}

    def __call__(self, text: str, place: str) -> list[int]:
        """Ids of ``text``; ``[]`` for the empty text.

        Raises:
            Refusal: D-CONTROL, the tokenizer still turns this text into a control token.
        """
        backend = self._at[place]
        # The backend is shared with the stock tokenizer (copying LLaMA-3's takes a second): settings of earlier stock
        # calls are cleared here, and ours are reset for the next stock call.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        backend.encode_special_tokens = True  # what transformers calls split_special_tokens
        ids = backend.encode(text, add_special_tokens=False).ids if text else []
        backend.encode_special_tokens = False
        if not self.controls.keys().isdisjoint(ids):
            name = next(self.controls[i] for i in ids if i in self.controls)
            what, fix = f"the tokenizer turns this text into its control token {name}", "rephrase it, or remove it"
            raise Refusal("D-CONTROL", what, found=text, fix=fix)
        return ids


_ENCODERS: WeakKeyDictionary[PreTrainedTokenizerFast, TextEncoder] = WeakKeyDictionary()


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    """The :class:`TextEncoder` of a tokenizer, made once."""
    if tokenizer not in _ENCODERS:
        _ENCODERS[tokenizer] = TextEncoder(tokenizer)
    return _ENCODERS[tokenizer]


def _prefixes(part: dict) -> set[str]:
    """``{"always"}``, ``{"first"}`` or empty: where a normaliser or pre-tokenizer puts a space before the text."""
    found = set()
    for child in part.get("normalizers", []) + part.get("pretokenizers", []):
        found |= _prefixes(child)
    if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
        found.add(part["prepend_scheme"])
    if part["type"] == "Prepend" or (part["type"] == "ByteLevel" and part["add_prefix_space"]):
        found.add("always")
    return found


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    state = json.loads(backend.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        state[name] = _strip_prefix(state[name]) if state[name] else None
    return Tokenizer.from_str(json.dumps(state))


def _strip_prefix(part: dict) -> dict | None:
    part = dict(part)
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            part[name] = [kept for child in part[name] if (kept := _strip_prefix(child)) is not None]
    if part["type"] == "Metaspace":
        part["prepend_scheme"] = "never"
    if part["type"] == "ByteLevel":
        part["add_prefix_space"] = False
    return None if part["type"] == "Prepend" else part
