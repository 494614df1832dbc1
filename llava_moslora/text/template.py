"""What a prompt format is written with: control tokens, plain text, and the variables ``TEXT`` and ``SYSTEM``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Control:
    """A control token, by its name in the tokenizer."""

    name: str


class Variable(Enum):
    TEXT = "text"  # the turn's own text
    SYSTEM = "system"  # the rendered system text, in formats that put it inside the first human turn


TEXT, SYSTEM = Variable.TEXT, Variable.SYSTEM
BOS = Control("bos_token")  # the tokenizer's own; nothing for a tokenizer that does not begin its texts with one
EOS = Control("eos_token")  # the tokenizer's own

Segments = tuple["str | Control | Variable", ...]


@dataclass(frozen=True)
class Template:
    """One prompt format. A conversation is ``begin``, then ``system``, then rounds of ``human reply answer separator``.

    Attributes:
        begin: once, before everything.
        system: a system turn; it takes the place of ``SYSTEM`` in the first human turn, or else stands after ``begin``.
        human: a human turn.
        reply: what makes the model answer; a prompt for generation ends with it.
        answer: an answer; all of it is trained, its last segment is where generation stops.
        separator: after a round, not trained.
        default_system: system text of records that bring none.
        images_only: of the human text only the images are kept (LLaVA's first stage).
    """

    human: Segments
    answer: Segments
    reply: Segments = ()
    begin: Segments = ()
    system: Segments = ()
    separator: Segments = ()
    default_system: str | None = None
    images_only: bool = False
