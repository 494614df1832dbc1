"""The prompt formats: the control tokens and text around a turn.

A format is a :class:`~llava_moslora.text.template.Template`, made of segments. ConversationEncoder turns them into ids
and labels, and :func:`chat_template` into the Jinja template of an exported model, so training and exported prompts
cannot differ.

Sources: LLaVA ``llava/conversation.py`` (vicuna_v1, llama_2, plain) and ``train.py`` (what is trained); XTuner
``xtuner/utils/templates.py`` (llama3_chat, internlm2_chat, vicuna); LLM-Adapters ``finetune.py`` (llm_adapters).
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerFast

from llava_moslora.errors import Refusal, did_you_mean
from llava_moslora.text.template import BOS, EOS, SYSTEM, TEXT, Control, Segments, Template
from llava_moslora.text.tokenizer import IMAGE_TOKEN
from llava_moslora.text.tokenizer_template import derive_template

TOKENIZER_TEMPLATE = "tokenizer"  # the name of the format of the tokenizer's own chat template

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IM_START, IM_END = Control("<|im_start|>"), Control("<|im_end|>")
HEADER, END_HEADER, EOT = Control("<|start_header_id|>"), Control("<|end_header_id|>"), Control("<|eot_id|>")

CHATML = Template(
    begin=(BOS,),
    system=(IM_START, "system\n", TEXT, IM_END, "\n"),
    human=(IM_START, "user\n", TEXT, IM_END, "\n"),
    reply=(IM_START, "assistant\n"),
    answer=(TEXT, IM_END),
    separator=("\n",),
)

TEMPLATES: dict[str, Template] = {
    "chatml": CHATML,
    "llama3": Template(
        begin=(Control("<|begin_of_text|>"),),
        system=(HEADER, "system", END_HEADER, "\n\n", TEXT, EOT),
        human=(HEADER, "user", END_HEADER, "\n\n", TEXT, EOT),
        reply=(HEADER, "assistant", END_HEADER, "\n\n"),
        answer=(TEXT, EOT),
    ),
    "internlm2": replace(CHATML, begin=(Control("<s>"),)),
    # LLaVA's: question and answer are plain text without control tokens between them.
    "vicuna_v1": Template(
        begin=(BOS,),
        system=(TEXT, " "),
        human=("USER: ", TEXT, " "),
        reply=("ASSISTANT:",),
        answer=(" ", TEXT, EOS),
        default_system=VICUNA_SYSTEM,
    ),
    # XTuner's: BOS before every round. XTuner writes no space before the answer but tokenises the answer separately,
    # where Llama's dummy prefix adds one; the space written here gives the same ids, also when tokenised as one text.
    "vicuna": Template(
        system=(VICUNA_SYSTEM + " ", TEXT, "\n "),
        human=(BOS, SYSTEM, "USER: ", TEXT, " "),
        reply=("ASSISTANT:",),
        answer=(" ", TEXT, EOS),
        separator=("\n",),
    ),
    "llama2": Template(
        system=("<<SYS>>\n", TEXT, "\n<</SYS>>\n\n"),
        human=(BOS, "[INST] ", SYSTEM, TEXT, " [/INST]"),
        answer=(" ", TEXT, " ", EOS),
    ),
    # LLM-Adapters' training prompt, white space included (`generate_prompt` of finetune.py, in an indented string). Its
    # test prompt has other white space: evaluation/commonsense.
    "llm_adapters": Template(
        begin=(BOS,),
        human=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"  \n\n{' ' * 16}### Instruction:\n{' ' * 16}",
            TEXT,
        ),
        reply=(f"\n{' ' * 16}\n{' ' * 16}### Response:\n{' ' * 16}",),
        answer=(TEXT, EOS),
        keeps_space=True,
        one_round=True,
    ),
    # LLaVA's stage 1: an image, its caption, a newline.
    "plain": Template(begin=(BOS,), human=(TEXT,), answer=(TEXT, "\n"), images_only=True),
}


def get_template(name: str, tokenizer: PreTrainedTokenizerFast) -> Template:
    """The template called ``name``; ``"tokenizer"`` is the tokenizer's own.

    Raises:
        Refusal: C-TEMPLATE, no template of that name, or the tokenizer's own cannot be followed exactly.
    """
    if name == TOKENIZER_TEMPLATE:
        return derive_template(tokenizer)
    if name not in TEMPLATES:
        expected = " | ".join([*sorted(TEMPLATES), TOKENIZER_TEMPLATE])
        fix = did_you_mean(name, [*TEMPLATES, TOKENIZER_TEMPLATE]) or None
        raise Refusal("C-TEMPLATE", "unknown prompt template", key="--version", found=name, expected=expected, fix=fix)
    return TEMPLATES[name]


def recognise_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The name of the template that a tokenizer's control tokens belong to, else ``"tokenizer"`` if it has its own.

    Llama-2 and Vicuna share their tokens: a chat template with ``<<SYS>>`` is Llama-2-chat's, and Vicuna's folders have
    no chat template at all.

    Raises:
        Refusal: C-TEMPLATE, the tokens belong to no known template and the tokenizer's own cannot be used.
    """
    names = tokenizer.added_tokens_encoder.keys()
    if {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= names:
        return "llama3"
    if {"<|im_start|>", "<|im_end|>"} <= names:
        return "internlm2" if "<|action_start|>" in names else "chatml"
    own = tokenizer.chat_template or ""
    if tokenizer.bos_token == "<s>" and tokenizer.eos_token == "</s>" and (not own or "<<SYS>>" in own):
        return "llama2" if own else "vicuna_v1"
    if own:
        derive_template(tokenizer)  # refuses it here, where it is chosen
        return TOKENIZER_TEMPLATE
    raise Refusal(
        "C-TEMPLATE", "the tokenizer's control tokens belong to no known prompt template",
        found=", ".join(list(names)[:12]), expected=" | ".join(sorted(TEMPLATES)),
        fix="give the format that the model was tuned with: --version NAME",
    )  # fmt: skip


# The ids of a tokenizer's added tokens by name, and the one that it begins its texts with
_CONTROL_IDS: WeakKeyDictionary[PreTrainedTokenizerFast, tuple[dict[str, int], int | None]] = WeakKeyDictionary()


def control_id(control: Control, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The id of a control token; ``None`` for ``BOS`` if the tokenizer adds none.

    Raises:
        Refusal: C-TEMPLATE, the tokenizer lacks the token.
    """
    if tokenizer not in _CONTROL_IDS:
        first = tokenizer("a").input_ids[0]
        bos = first if first == tokenizer.bos_token_id else None
        _CONTROL_IDS[tokenizer] = dict(tokenizer.added_tokens_encoder), bos
    ids, bos = _CONTROL_IDS[tokenizer]
    if control == BOS:
        return bos
    found = ids.get(tokenizer.eos_token if control == EOS else control.name)
    if found is None:
        what = f"the prompt template needs the control token {control.name}, which the tokenizer does not have"
        fix = f"choose the template of this model: {' | '.join(sorted(TEMPLATES))}"
        raise Refusal("C-TEMPLATE", what, key="--version", fix=fix)
    return found


def stop_token_ids(tokenizer: PreTrainedTokenizerFast, template: str) -> list[int]:
    """Ids at which generation stops: the trained end of an answer, then the tokenizer's own end-of-text token."""
    last = get_template(template, tokenizer).answer[-1]
    stop = control_id(last, tokenizer) if isinstance(last, Control) else tokenizer.encode(last)[-1]
    return list(dict.fromkeys(i for i in (stop, tokenizer.eos_token_id) if i is not None))


def chat_template(template: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The Jinja chat template of an exported model.

    Messages are ``{"role": "system" | "user" | "assistant", "content": CONTENT}``, where CONTENT is a string, which
    may contain ``<image>``, or a list of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``, which are written
    on separate lines. For text without control tokens in it the stock tokenizer's ids of the rendered prompt equal
    :func:`llava_moslora.text.conversation.encode_prompt`. (A template cannot stop a user from typing ``<|eot_id|>``
    into a stock chat; our own inference can.)
    """
    prompt = get_template(template, tokenizer)

    def jinja(segments: Segments, text: str = "text") -> str:
        """Segments as one Jinja expression; ``text`` is the expression of the turn's own text."""
        terms, values = [], {TEXT: text, SYSTEM: "state.system"}
        for segment in segments:
            if isinstance(segment, Control):
                found = control_id(segment, tokenizer)
                terms += [] if found is None else [_quote(tokenizer.convert_ids_to_tokens(found))]
            else:
                terms.append(_quote(segment) if isinstance(segment, str) else values[segment])
        return " + ".join(terms) or "''"

    shown = "state.images" if prompt.images_only else "text"
    trim = "" if prompt.keeps_space else " | trim"
    inside = SYSTEM in prompt.human  # the system text is kept for the first human turn
    only_one = "{%- if messages | length > 2 -%}{{ raise_exception('this prompt has only one question') }}{%- endif -%}"
    lines = ["{%- set state = namespace(system='', text='', images='') -%}", f"{{{{- {jinja(prompt.begin)} -}}}}"]
    lines += [only_one] if prompt.one_round else []
    if prompt.default_system is not None:
        default = jinja(prompt.system, _quote(prompt.default_system))
        lines.append(f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {default} -}}}}{{%- endif -%}}")
    lines += [
        "{%- for message in messages -%}",
        "{%- set state.text = '' -%}{%- set state.images = '' -%}",
        "{%- if message['content'] is string -%}{%- set state.text = message['content'] -%}",
        "{%- else -%}{%- for item in message['content'] -%}",
        f"{{%- set part = {_quote(IMAGE_TOKEN)} if item['type'] == 'image' else item['text']{trim} -%}}",
        r"{%- set state.text = state.text + ('' if loop.first else '\n') + part -%}",
        "{%- endfor -%}{%- endif -%}",
        f"{{%- set text = state.text{trim} -%}}",
    ]
    if prompt.images_only:
        image = _quote(IMAGE_TOKEN)
        lines.append(f"{{%- set state.images = {image} * (text.split({image}) | length - 1) -%}}")
    system = jinja(prompt.system)
    lines += [
        "{%- if message['role'] == 'system' -%}",
        f"{{%- set state.system = {system} -%}}" if inside else f"{{{{- {system} -}}}}",
        "{%- elif message['role'] == 'user' -%}",
        f"{{{{- {jinja(prompt.human, shown)} -}}}}",
        "{%- set state.system = '' -%}",
        "{%- elif message['role'] == 'assistant' -%}",
        f"{{{{- {jinja(prompt.reply + prompt.answer + prompt.separator)} -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {jinja(prompt.reply)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines)


def _quote(text: str) -> str:
    """``text`` as a Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
