"""The parts that a prompt format is written with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Control:
    """A control token, by its name in the tokenizer."""

    name: str


class Slot(Enum):
    TEXT = "text"  # the turn's own text
    SYSTEM = "system"  # the rendered system text, in formats that put it inside the first human turn


TEXT, SYSTEM = Slot.TEXT, Slot.SYSTEM
BOS = Control("bos_token")  # the tokenizer's own; nothing for a tokenizer that does not begin its texts with one
EOS = Control("eos_token")  # the tokenizer's own

Pieces = tuple["str | Control | Slot", ...]


@dataclass(frozen=True)
class Template:
    """One prompt format. A conversation is ``begin``, then ``system``, then rounds of ``human reply answer separator``.

    Attributes:
        begin: once, before everything.
        system: around a system turn; goes into the ``SYSTEM`` slot of the first human turn, or else after ``begin``.
        human: around a human turn.
        reply: what makes the model answer; a prompt for generation ends with it.
        answer: around an answer; all of it is trained, its last piece is where generation stops.
        separator: after a round, not trained.
        default_system: system text of records that bring none.
        images_only: of the human text only the images are kept (LLaVA's first stage).
    """

    human: Pieces
    answer: Pieces
    reply: Pieces = ()
    begin: Pieces = ()
    system: Pieces = ()
    separator: Pieces = ()
    default_system: str | None = None
    images_only: bool = False
