"""Derives a :class:`Template` that writes exactly what a tokenizer's own chat template writes, or refuses.

A chat template is a program that renders a conversation as one string; it does not tell which tokens are the
answer. But nearly all of them write fixed texts around the turns, which are found by rendering conversations of marker
words. The result is checked by rendering more conversations with both. A chat template that does something else (drops
the reasoning of earlier answers, writes today's date, changes the text) is refused: its labels would be guesswork.

Trained are the tokens from the end of the generation prompt up to and including the first control token after the
answer, where generation stops.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerFast

from llava_moslora.errors import Refusal
from llava_moslora.text.bounded import bounded_steps, huge_number
from llava_moslora.text.template import SYSTEM, TEXT, Control, Segments, Template

QUESTION, ANSWER, SECOND_QUESTION, SYSTEM_TEXT = "Qask0Q", "Qreply0Q", "Qask1Q", "Qrule0Q"
DATE_FUNCTIONS = ("strftime_now", "datetime")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_DERIVED: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[str, Template]] = WeakKeyDictionary()


def derive_template(tokenizer: PreTrainedTokenizerFast) -> Template:
    """The format that ``tokenizer.chat_template`` writes, derived once per tokenizer.

    Raises:
        Refusal: C-TEMPLATE, there is none, or it cannot be followed exactly.
    """
    source = tokenizer.chat_template
    if not isinstance(source, str) or not source:
        raise _refusal("the tokenizer has no chat template of its own", found=type(source).__name__)
    if tokenizer not in _DERIVED or _DERIVED[tokenizer][0] != source:
        _DERIVED[tokenizer] = source, _derive(tokenizer)
    return _DERIVED[tokenizer][1]


def _refusal(what: str, **parts: Any) -> Refusal:
    fix = "give the template that the model was tuned with, --version NAME, or correct chat_template"
    return Refusal("C-TEMPLATE", what, key="--version tokenizer", fix=fix, **parts)


def _derive(tokenizer: PreTrainedTokenizerFast) -> Template:
    if any(name in tokenizer.chat_template for name in DATE_FUNCTIONS):
        raise _refusal("the chat template contains the current date, so prompts would change from day to day")
    if (found := huge_number(tokenizer.chat_template)) is not None:
        raise _refusal("the chat template computes a huge number", found=found)
    prompt = _apply_chat_template(tokenizer, ("user", QUESTION))
    before, after = _split(prompt, QUESTION)
    longer = _apply_chat_template(tokenizer, ("user", QUESTION), ("assistant", ANSWER), ("user", SECOND_QUESTION))
    again, to_reply, to_ask, end = _split(longer, QUESTION, ANSWER, SECOND_QUESTION)
    if again != before or end != after or not to_reply.startswith(after):
        raise _refusal(
            "the chat template does not write an answer directly after its generation prompt",
            found=repr(to_reply), expected=f"{after!r} and then the answer",
        )  # fmt: skip
    behind = _segments(to_ask, tokenizer)
    stop = next((k for k, segment in enumerate(behind) if isinstance(segment, Control)), None)
    if stop is None:
        raise _refusal("no control token ends an answer, so the model would not learn to stop", found=repr(to_ask))
    human = _common_end(_segments(before, tokenizer), behind[stop + 1 :])
    between = _as_text(behind[stop + 1 :])
    first = _first_turn(tokenizer, before[: len(before) - len(human)], human)
    closing = _split(_apply_chat_template(tokenizer, ("user", QUESTION), prompt=False), QUESTION)[1]
    closing = closing if after.startswith(closing) else after  # some always write the beginning of the reply
    template = replace(
        first,
        human=(*first.human, *_segments(closing, tokenizer)),
        reply=_segments(after[len(closing) :], tokenizer),
        answer=(*_segments(to_reply[len(after) :], tokenizer), TEXT, *behind[: stop + 1]),
        separator=_segments(between[: len(between) - len(human)], tokenizer),
    )
    _check(tokenizer, template)
    return template


def _first_turn(tokenizer: PreTrainedTokenizerFast, head: str, human: str) -> Template:
    """``begin``, ``system``, ``human`` and ``default_system``, from conversations with and without a system text.

    Args:
        head: what is written without a system text, before the human turn.
        human: what begins every human turn.
    """
    segments = partial(_segments, tokenizer=tokenizer)
    first = Template(begin=segments(head), human=(*segments(human), TEXT), answer=())
    try:
        written = _apply_chat_template(tokenizer, ("system", SYSTEM_TEXT), ("user", QUESTION))
    except Refusal:
        return first  # no system turn; one in the data is refused
    opened, closed, _ = _split(written, SYSTEM_TEXT, QUESTION)
    if opened.startswith(head + human):  # inside the first human turn, as in Llama 2
        system = (*segments(opened[len(head + human) :]), TEXT, *segments(closed))
        return replace(first, human=(*segments(human), SYSTEM, TEXT), system=system)
    if not closed.endswith(human):
        raise _refusal("the chat template writes the first question in two ways", found=repr(closed))
    closed = closed[: len(closed) - len(human)]
    if opened.startswith(head):
        opened = opened[len(head) :]
    elif head.startswith(opened) and head.endswith(closed) and len(head) >= len(opened) + len(closed):
        # the template has a default system text, or, like LLaMA-3.1's, always a system turn: then it is empty
        first = replace(first, begin=(), default_system=head[len(opened) : len(head) - len(closed)])
    else:
        raise _refusal("the chat template begins in two ways", found=repr(opened), expected=repr(head))
    return replace(first, system=(*segments(opened), TEXT, *segments(closed)))


def _check(tokenizer: PreTrainedTokenizerFast, template: Template) -> None:
    """Render conversations with ``template`` and with the chat template, and refuse at the first difference."""
    rounds = [("user", "Why?"), ("assistant", "So.\n\nIndeed"), ("user", "x"), ("assistant", "<b> {y}")]
    rounds += [("user", "A b"), ("assistant", "1"), ("user", "2")]
    for start in ([], [("system", "Be brief.\nDo.")]) if template.system else ([],):
        for end in range(1, len(rounds) + 1):
            messages = start + rounds[:end]
            theirs = _apply_chat_template(tokenizer, *messages, prompt=messages[-1][0] == "user")
            ours = _render(template, messages)
            # what a template writes after the last stop token does not matter: it is not trained
            if theirs != ours if messages[-1][0] == "user" else not theirs.startswith(ours):
                at = _common_start_length(theirs, ours)
                raise _refusal(
                    f"the chat template's output for {len(messages)} turns depends on their number or content",
                    found=repr(theirs[at : at + 40]), expected=repr(ours[at : at + 40]),
                )  # fmt: skip
            if GENERATION.search(tokenizer.chat_template):
                _check_answer_mask(tokenizer, template, messages)


def _check_answer_mask(tokenizer: PreTrainedTokenizerFast, template: Template, messages: list[tuple[str, str]]) -> None:
    """A template that marks its answers (``{% generation %}``) must mark what is trained here."""
    encoded = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages],
        return_assistant_tokens_mask=True, return_dict=True,
    )  # fmt: skip
    marked = [token for token, mine in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mine]
    answers = [text for role, text in messages if role == "assistant"]
    ours = "".join(_as_text(template.answer, answer) for answer in answers)
    if (found := tokenizer.decode(marked)).strip() != ours.strip():
        what = "the chat template's {% generation %} marks something other than the answer and its stop token"
        raise _refusal(what, found=repr(found), expected=repr(ours))


def _render(template: Template, messages: list[tuple[str, str]]) -> str:
    """The conversation as ``template`` writes it, up to the last stop token."""
    system = template.default_system
    if messages[0][0] == "system":
        system, messages = messages[0][1], messages[1:]
    heading = "" if system is None else _as_text(template.system, system)
    text = _as_text(template.begin)
    if SYSTEM not in template.human:
        text, heading = text + heading, ""
    for k, (role, content) in enumerate(messages):
        if role == "user":
            text, heading = text + _as_text(template.human + template.reply, content, heading), ""
        else:
            text += _as_text(template.answer, content)
            text += _as_text(template.separator) if k < len(messages) - 1 else ""
    return text


def _as_text(segments: Segments, text: str = "", system: str = "") -> str:
    values = {TEXT: text, SYSTEM: system}
    return "".join(s if isinstance(s, str) else s.name if isinstance(s, Control) else values[s] for s in segments)


def _segments(text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str | Control, ...]:
    """A fixed text as control tokens and plain texts."""
    names = sorted(
        (token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len, reverse=True
    )
    cut = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return tuple(Control(part) if part in names else part for part in cut if part)


def _split(text: str, *markers: str) -> list[str]:
    """``text`` between the markers, each of which must be in it once and unchanged."""
    parts = []
    for marker in markers:
        before, found, text = text.partition(marker)
        if not found or marker in text:
            what = "the chat template changes, drops or repeats the text of a turn"
            raise _refusal(what, found=repr(before + found)[:80])
        parts.append(before)
    return [*parts, text]


def _apply_chat_template(tokenizer: PreTrainedTokenizerFast, *messages: tuple[str, str], prompt: bool = True) -> str:
    try:
        with bounded_steps():
            return tokenizer.apply_chat_template(
                [{"role": role, "content": text} for role, text in messages],
                add_generation_prompt=prompt, tokenize=False,
            )  # fmt: skip
    except Exception as error:  # whatever Jinja, or the template itself, raises
        what = "the chat template cannot render a conversation"
        raise _refusal(what, found=f"{type(error).__name__}: {error}") from None


def _common_end(a: Sequence[str | Control], b: Sequence[str | Control]) -> str:
    """The text that both end with; a control token is not cut (``<s>`` and ``</s>`` both end with ``s>``)."""
    end = ""
    for one, two in zip(reversed(a), reversed(b), strict=False):
        if isinstance(one, Control) or isinstance(two, Control) or one == two:
            if one != two:
                break
            end = (one.name if isinstance(one, Control) else one) + end
        else:
            return one[len(one) - _common_start_length(one[::-1], two[::-1]) :] + end
    return end


def _common_start_length(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
