"""Elements of a prompt format: control tokens, plain text, and the variables ``TEXT`` and ``SYSTEM``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True)
class Control:
    """A control token, by its name in the tokenizer."""

    name: str


class Variable(Enum):
    TEXT = "text"  # the turn's own text
    SYSTEM = "system"  # the rendered system text, in formats that put it inside the first human turn


TEXT, SYSTEM = Variable.TEXT, Variable.SYSTEM
BOS = Control("bos_token")  # the tokenizer's own; empty for a tokenizer that adds no BOS
EOS = Control("eos_token")  # the tokenizer's own

Segments = tuple["str | Control | Variable", ...]


@dataclass(frozen=True)
class Template:
    """One prompt format: a conversation is ``begin``, ``system``, then rounds of ``human reply answer separator``."""

    human: Segments
    answer: Segments  # all of it is trained; generation stops at its last segment
    reply: Segments = ()  # the prefix of an answer; a generation prompt ends with it
    begin: Segments = ()
    system: Segments = ()  # it replaces SYSTEM in the first human turn, or else follows `begin`
    separator: Segments = ()  # after a round, not trained
    default_system: str | None = None  # system text for records without one
    images_only: bool = False  # only the images of the human text are kept (LLaVA's stage 1)
    # White space around a turn's text is kept, not stripped. (Not in repr, which is in the names of data caches.)
    keeps_space: bool = field(default=False, repr=False)
    one_round: bool = field(default=False, repr=False)  # a conversation with a second question is refused
