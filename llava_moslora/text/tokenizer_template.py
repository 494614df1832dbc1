"""A tokenizer's own chat template, followed exactly: read off as pieces, or refused.

A chat template is a program that writes a whole conversation as one string; which tokens of it an answer is made of is
not said. But nearly every one writes fixed texts around what was said, and those are found by letting it write
conversations of marker words. The pieces found are proved by writing more conversations both ways. A template that
does something else (drops what an earlier answer thought, writes today's date, changes the text) is refused: its
labels would be a guess.

Of an answer is trained: what the template writes between the end of the generation prompt and the first control token
after the answer, which is included and is where generation stops.
"""

from __future__ import annotations

import re
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerFast

from llava_moslora.errors import Refusal
from llava_moslora.text.template import SYSTEM, TEXT, Control, Pieces, Template

ASK, REPLY, ASK_AGAIN, RULE = "Qask0Q", "Qreply0Q", "Qask1Q", "Qrule0Q"
TODAY = ("strftime_now", "datetime")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_FOUND: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[str, Template]] = WeakKeyDictionary()


def own_template(tokenizer: PreTrainedTokenizerFast) -> Template:
    """The format of ``tokenizer.chat_template``, made once.

    Raises:
        Refusal: C-TEMPLATE, there is none, or its answers cannot be told exactly.
    """
    source = tokenizer.chat_template
    if not isinstance(source, str) or not source:
        raise _refusal("the tokenizer has no chat template of its own", found=type(source).__name__)
    if tokenizer not in _FOUND or _FOUND[tokenizer][0] != source:
        _FOUND[tokenizer] = source, _read_off(tokenizer)
    return _FOUND[tokenizer][1]


def _refusal(what: str, **parts: object) -> Refusal:
    fix = "name a template that writes what the model was tuned on, --version NAME, or mend chat_template"
    return Refusal("C-TEMPLATE", what, key="--version tokenizer", fix=fix, **parts)


def _read_off(tokenizer: PreTrainedTokenizerFast) -> Template:
    if any(name in tokenizer.chat_template for name in TODAY):
        raise _refusal("the chat template writes the date: tomorrow's prompt would be another one")
    prompt = _write(tokenizer, ("user", ASK))
    before, after = _split(prompt, ASK)
    longer = _write(tokenizer, ("user", ASK), ("assistant", REPLY), ("user", ASK_AGAIN))
    again, to_reply, to_ask, end = _split(longer, ASK, REPLY, ASK_AGAIN)
    if again != before or end != after or not to_reply.startswith(after):
        raise _refusal(
            "the chat template does not write an answer behind the prompt that asks for it",
            found=repr(to_reply), expected=f"{after!r} and then the answer",
        )  # fmt: skip
    behind = _pieces(to_ask, tokenizer)
    stop = next((k for k, piece in enumerate(behind) if isinstance(piece, Control)), None)
    if stop is None:
        raise _refusal("no control token ends an answer, so nothing would teach the model to stop", found=repr(to_ask))
    human = _common_end(_pieces(before, tokenizer), behind[stop + 1 :])
    between = _text(behind[stop + 1 :])
    turn = _HumanTurn(tokenizer, before[: len(before) - len(human)], human)
    closing = _split(_write(tokenizer, ("user", ASK), prompt=False), ASK)[1]
    closing = closing if after.startswith(closing) else after  # some write the reply's beginning in any case
    form = Template(
        begin=turn.begin,
        system=turn.system,
        human=(*turn.human, *_pieces(closing, tokenizer)),
        reply=_pieces(after[len(closing) :], tokenizer),
        answer=(*_pieces(to_reply[len(after) :], tokenizer), TEXT, *behind[: stop + 1]),
        separator=_pieces(between[: len(between) - len(human)], tokenizer),
        default_system=turn.default_system,
    )
    _prove(tokenizer, form)
    return form


class _HumanTurn:
    """What stands before the first question, with a system text, without one, and with the template's own."""

    begin: Pieces
    system: Pieces = ()
    human: Pieces
    default_system: str | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast, head: str, human: str):
        self.begin, self.human = _pieces(head, tokenizer), (*_pieces(human, tokenizer), TEXT)
        try:
            written = _write(tokenizer, ("system", RULE), ("user", ASK))
        except Refusal:
            return  # no place for a system turn; one in the data is refused
        opened, closed, _ = _split(written, RULE, ASK)
        if opened.startswith(head + human):  # inside the first human turn, as Llama 2 has it
            self.human = (*_pieces(human, tokenizer), SYSTEM, TEXT)
            self.system = (*_pieces(opened[len(head + human) :], tokenizer), TEXT, *_pieces(closed, tokenizer))
            return
        if not closed.endswith(human):
            raise _refusal("the chat template writes the first question in two ways", found=repr(closed))
        closed = closed[: len(closed) - len(human)]
        if opened.startswith(head):
            opened = opened[len(head) :]
        elif head.startswith(opened) and head.endswith(closed) and len(head) >= len(opened) + len(closed):
            # the template has a system text of its own, or, as LLaMA-3.1's, a system turn in any case: then it is empty
            self.begin, self.default_system = (), head[len(opened) : len(head) - len(closed)]
        else:
            raise _refusal("the chat template begins in two ways", found=repr(opened), expected=repr(head))
        self.system = (*_pieces(opened, tokenizer), TEXT, *_pieces(closed, tokenizer))


def _prove(tokenizer: PreTrainedTokenizerFast, form: Template) -> None:
    """Write conversations by ``form`` and by the template, and refuse at the first difference."""
    rounds = [
        ("user", "Why?"),
        ("assistant", "So.\n\nIndeed"),
        ("user", "x"),
        ("assistant", "<b> {y}"),
        ("user", "A b"),
    ]
    rounds += [("assistant", "1"), ("user", "2")]
    for start in ([], [("system", "Be brief.\nDo.")]) if form.system else ([],):
        for end in range(1, len(rounds) + 1):
            messages = start + rounds[:end]
            theirs = _write(tokenizer, *messages, prompt=messages[-1][0] == "user")
            ours = _written(form, messages)
            # behind the last stop token nothing is trained, so what a template writes there does not matter
            if theirs != ours if messages[-1][0] == "user" else not theirs.startswith(ours):
                at = _alike(theirs, ours)
                raise _refusal(
                    f"the chat template writes {len(messages)} turns in a way that their number or content decides",
                    found=repr(theirs[at : at + 40]), expected=repr(ours[at : at + 40]),
                )  # fmt: skip
            if GENERATION.search(tokenizer.chat_template):
                _prove_mask(tokenizer, form, messages)


def _prove_mask(tokenizer: PreTrainedTokenizerFast, form: Template, messages: list[tuple[str, str]]) -> None:
    """A template that marks its answers itself must mark what is trained here."""
    told = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages],
        return_assistant_tokens_mask=True, return_dict=True,
    )  # fmt: skip
    marked = [token for token, mine in zip(told["input_ids"], told["assistant_masks"], strict=True) if mine]
    answers = [text for role, text in messages if role == "assistant"]
    ours = "".join(_text(form.answer, answer) for answer in answers)
    if (found := tokenizer.decode(marked)).strip() != ours.strip():
        what = "the chat template's {% generation %} marks something else than the answer and its stop token"
        raise _refusal(what, found=repr(found), expected=repr(ours))


def _written(form: Template, messages: list[tuple[str, str]]) -> str:
    """The conversation as the pieces say it, up to the last stop token."""
    system = form.default_system
    if messages[0][0] == "system":
        system, messages = messages[0][1], messages[1:]
    heading = "" if system is None else _text(form.system, system)
    text = _text(form.begin)
    if SYSTEM not in form.human:
        text, heading = text + heading, ""
    for k, (role, said) in enumerate(messages):
        if role == "user":
            text, heading = text + _text(form.human + form.reply, said, heading), ""
        else:
            text += _text(form.answer, said)
            text += _text(form.separator) if k < len(messages) - 1 else ""
    return text


def _text(pieces: Pieces, text: str = "", system: str = "") -> str:
    slots = {TEXT: text, SYSTEM: system}
    return "".join(piece.name if isinstance(piece, Control) else slots.get(piece, piece) for piece in pieces)


def _pieces(text: str, tokenizer: PreTrainedTokenizerFast) -> Pieces:
    """A fixed text as control tokens and plain texts."""
    names = sorted(
        (token.content for token in tokenizer.added_tokens_decoder.values() if token.special), key=len, reverse=True
    )
    cut = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return tuple(Control(part) if part in names else part for part in cut if part)


def _split(text: str, *marks: str) -> list[str]:
    """``text`` without the marks, each of which must stand in it once and as it was given."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise _refusal("the chat template changes, drops or repeats what was said", found=repr(before + found)[:80])
        parts.append(before)
    return [*parts, text]


def _write(tokenizer: PreTrainedTokenizerFast, *messages: tuple[str, str], prompt: bool = True) -> str:
    try:
        return tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages], add_generation_prompt=prompt, tokenize=False
        )
    except Exception as error:  # whatever Jinja, or the template itself, finds to say
        what = "the chat template cannot write a conversation"
        raise _refusal(what, found=f"{type(error).__name__}: {error}") from None


def _common_end(a: Pieces, b: Pieces) -> str:
    """The text that both end with; a control token is not cut (``<s>`` and ``</s>`` both end with ``s>``)."""
    end = ""
    for one, two in zip(reversed(a), reversed(b), strict=False):
        if isinstance(one, Control) or isinstance(two, Control) or one == two:
            if one != two:
                break
            end = (one.name if isinstance(one, Control) else one) + end
        else:
            return one[len(one) - _alike(one[::-1], two[::-1]) :] + end
    return end


def _alike(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
