"""Writes Ollama's Modelfile for a model in two GGUF files, with the prompt template and the stop strings.

Ollama renders a prompt with a Go template over ``.System`` (all system texts) and ``.Messages``, in which an image is
already written as ``[img-0]``; llama.cpp then parses names of control tokens in it as those tokens, and adds the
tokenizer's BOS if the tokenizer does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from llava_moslora.text.template import SYSTEM, TEXT, Control, Segments
from llava_moslora.text.templates import control_id, get_template, stop_token_ids


def modelfile(template: str, tokenizer: PreTrainedTokenizerFast, files: Sequence[str]) -> str | None:
    """The Modelfile's text; None for a template without user text, which cannot be used for chat.

    For alternating messages that end with the user's, and text without control tokens and surrounding white space, the
    tokenizer's ids of the rendered prompt are those of :func:`llava_moslora.text.conversation.encode_prompt`. (Except
    for SentencePiece tokenizers with ``legacy: false``, which add a space at the start of a text and not after BOS.)

    Args:
        template: name of the prompt template.
        files: GGUF files by their paths from the Modelfile: the LLM, and the image encoder if there is one.

    Raises:
        Refusal: C-TEMPLATE, template and tokenizer do not fit.
    """
    if get_template(template, tokenizer).images_only:
        return None
    stops = [tokenizer.convert_ids_to_tokens(number) for number in stop_token_ids(tokenizer, template)]
    lines = [f"FROM {file}" for file in files]
    lines += [f'TEMPLATE """{go_template(template, tokenizer)}"""']
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def go_template(template: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The prompt template as a Go template, without the leading BOS.

    Raises:
        Refusal: C-TEMPLATE, template and tokenizer do not fit.
    """
    prompt = get_template(template, tokenizer)
    first = tokenizer("a").input_ids[0]

    def is_bos(segment: object) -> bool:
        return isinstance(segment, Control) and control_id(segment, tokenizer) == first

    def actions(segments: Segments, text: str = ".Content") -> str:
        """Segments as actions, one after the other; ``text`` is the expression of the turn's own text."""
        values, said = {TEXT: f"{{{{ {text} }}}}", SYSTEM: system}, ""
        for segment in segments:
            if isinstance(segment, Control):
                number = control_id(segment, tokenizer)
                said += "" if number is None else _go(tokenizer.convert_ids_to_tokens(number))
            else:
                said += _go(segment) if isinstance(segment, str) else values[segment]
        return said

    system = ""
    if prompt.system:
        otherwise = ""
        if prompt.default_system is not None:
            otherwise = "{{ else }}" + actions(prompt.system, json.dumps(prompt.default_system))
        system = f"{{{{ if $system }}}}{actions(prompt.system, '$system')}{otherwise}{{{{ end }}}}"
    before, human, bos = prompt.begin, prompt.human, ""
    if before and is_bos(before[0]):
        before = before[1:]
    if is_bos(human[0]):  # before every round; llama.cpp adds the first
        bos, human = f"{{{{ if $later }}}}{actions(human[:1])}{{{{ end }}}}{{{{ $later = true }}}}", human[1:]
    if SYSTEM in human:  # in the first round only
        system, opening = system + '{{ $system = "" }}', ""
    else:
        opening = system
    question = bos + actions(human) + actions(prompt.reply)
    answer = actions(prompt.answer) + actions(prompt.separator)
    turns = f'{{{{ if eq .Role "user" }}}}{question}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
    start = "{{ $system := .System }}{{ $later := false }}" + actions(before) + opening
    return f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}"


def _go(text: str) -> str:
    """``text`` as an action that writes it; Go and JSON string literals are the same here."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"
