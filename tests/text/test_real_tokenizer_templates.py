"""Published chat templates on published tokenizers, read off by ``own_template``: hand-written tables of tokens.

``*`` marks a trained token; every table holds an image of two placeholders and a user who types ``<|eot_id|>``. The
ids are also those that transformers gives the template's own text, wherever a user cannot have typed a control token.
"""

import pytest

from llava_moslora.text.conversation import Turn, encode, encode_prompt
from llava_moslora.text.template_check import check_template
from llava_moslora.text.templates import stop_token_ids
from llava_moslora.text.tokenizer import load_tokenizer

# The chat_template of each published folder; None: the tokenizer brings its own. Of LLaMA-3.1's the parts about tools,
# which are for records that have some, are left out.
SOURCES = {
    "smollm2": ("smollm2", None),
    "llama3": (
        "llama3",
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "llama3.1": (
        "llama3",
        '{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = "26 Jul 2024" %}\n'
        "{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n"
        "    {%- set system_message = messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n"
        '{%- else %}\n    {%- set system_message = "" %}\n{%- endif %}\n'
        '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
        '{{- "Cutting Knowledge Date: December 2023\\n" }}\n{{- "Today Date: " + date_string + "\\n\\n" }}\n'
        '{{- system_message }}\n{{- "<|eot_id|>" }}\n{%- for message in messages %}\n'
        "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ "
        "message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
        "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
    ),
    "internlm2": (
        "internlm2",
        "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
        "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "llama2": (
        "llama2",
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
        "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
        "{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
        "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}",
    ),
    "tinyllama": (
        "llama2",
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    ),
}
TALK = [
    Turn("human", "<image>\nIs <|eot_id|> red?"),
    Turn("gpt", "No. </s>"),
    Turn("human", "And now?"),
    Turn("gpt", "Yes"),
]
RULE = Turn("system", "Be brief.")
SMOLLM2 = (
    "<|im_start|> user Ċ <image> <image> Ċ Is Ġ< | e ot _ id | > Ġred ? <|im_end|> Ċ"
    " <|im_start|> ass istant Ċ *No *. *Ġ</ *s *> *<|im_end|> Ċ"
    " <|im_start|> user Ċ And Ġnow ? <|im_end|> Ċ <|im_start|> ass istant Ċ *Yes *<|im_end|>"
)
LLAMA3 = (
    "<|start_header_id|> user <|end_header_id|> ĊĊ <image> <image> Ċ Is Ġ<| e ot _id | > Ġred ? <|eot_id|>"
    " <|start_header_id|> assistant <|end_header_id|> ĊĊ *No *. *Ġ</ *s *> *<|eot_id|>"
    " <|start_header_id|> user <|end_header_id|> ĊĊ And Ġnow ? <|eot_id|>"
    " <|start_header_id|> assistant <|end_header_id|> ĊĊ *Yes *<|eot_id|>"
)
CUTOFF = (
    "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ"
    " Cut ting ĠKnowledge ĠDate : ĠDecember Ġ 202 3 Ċ Today ĠDate : Ġ 26 ĠJul Ġ 202 4 ĊĊ"
)
INTERNLM2 = (
    "<|im_start|> user \n <image> <image> \n Is ▁< | e ot _id | > ▁red ? <|im_end|> \n"
    " <|im_start|> ass istant \n *No *. *▁</ *s *> *<|im_end|> \n"
    " <|im_start|> user \n And ▁now ? <|im_end|> \n <|im_start|> ass istant \n *Yes *<|im_end|> \n"
)
LLAMA2 = (
    "▁ <0x0A> Is ▁< | e ot _ id | > ▁red ? ▁[ / INST ] *▁No *. *▁</ *s *> *▁ *</s>"
    " <s> ▁[ INST ] ▁And ▁now ? ▁[ / INST ] *▁Yes *▁ *</s>"
)
TINYLLAMA = (
    "< | user | > <0x0A> <image> <image> ▁ <0x0A> Is ▁< | e ot _ id | > ▁red ? </s> ▁ <0x0A>"
    " < | ass istant | > <0x0A> *No *. *▁</ *s *> *</s> ▁ <0x0A>"
    " < | user | > <0x0A> And ▁now ? </s> ▁ <0x0A> < | ass istant | > <0x0A> *Yes *</s> ▁ <0x0A>"
)
# without a system turn, with one
TABLES = {
    "smollm2": (
        "<|im_start|> system Ċ You Ġare Ġa Ġhelpful ĠAI Ġassistant Ġnamed ĠSm ol LM , Ġtrained Ġby ĠH ugging ĠFace"
        f" <|im_end|> Ċ {SMOLLM2}",
        f"<|im_start|> system Ċ Be Ġbrief . <|im_end|> Ċ {SMOLLM2}",
    ),
    "llama3": (
        f"<|begin_of_text|> {LLAMA3}",
        f"<|begin_of_text|> <|start_header_id|> system <|end_header_id|> ĊĊ Be Ġbrief . <|eot_id|> {LLAMA3}",
    ),
    "llama3.1": (f"{CUTOFF} <|eot_id|> {LLAMA3}", f"{CUTOFF} Be Ġbrief . <|eot_id|> {LLAMA3}"),
    "internlm2": (f"<s> {INTERNLM2}", f"<s> <|im_start|> system \n Be ▁brief . <|im_end|> \n {INTERNLM2}"),
    "llama2": (
        f"<s> ▁[ INST ] ▁ <image> <image> {LLAMA2}",
        f"<s> ▁[ INST ] ▁<< SY S >> <0x0A> Be ▁brief . <0x0A> < </ SY S >> <0x0A> <0x0A> <image> <image> {LLAMA2}",
    ),
    "tinyllama": (f"▁{TINYLLAMA}", f"▁< | system | > <0x0A> Be ▁brief . </s> ▁ <0x0A> {TINYLLAMA}"),
}
STOPS = {"smollm2": "<|im_end|>", "internlm2": "<|im_end|>", "llama2": "</s>", "tinyllama": "</s>"}


@pytest.fixture(scope="module")
def own(real, real_folder):
    """``own(name)``: a published tokenizer with a published chat template."""
    made = {}

    def tokenizer(name: str):
        folder, source = SOURCES[name]
        if name not in made:
            made[name] = real(folder) if source is None else load_tokenizer(real_folder(folder))
            made[name].chat_template = source or made[name].chat_template
        return made[name]

    return tokenizer


@pytest.mark.parametrize("name", TABLES)
def test_token_table(own, name):
    tokenizer = own(name)
    for turns, table in zip((TALK, [RULE, *TALK]), TABLES[name], strict=True):
        encoded = encode(turns, tokenizer=tokenizer, template="tokenizer", image_tokens=[2])
        names = tokenizer.convert_ids_to_tokens(encoded.input_ids)
        marked = [("*" if label >= 0 else "") + token for token, label in zip(names, encoded.labels, strict=True)]
        assert marked == table.split(" ")
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer, "tokenizer"))[0] == STOPS.get(name, "<|eot_id|>")


@pytest.mark.parametrize("name", TABLES)
def test_ids_are_what_transformers_makes_of_the_template(own, name):
    """Prompts of one round and of three, with a system turn and without, byte for byte the template's own."""
    tokenizer = own(name)
    check_template(tokenizer, "tokenizer")
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    talk = [Turn("human", "Is it red?"), Turn("gpt", "No."), Turn("human", "And now, \n\n1 + 1?")]
    for turns in (talk[:1], talk, [RULE, *talk]):
        messages = [{"role": roles[turn.role], "content": turn.text} for turn in turns]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        theirs = tokenizer(text, add_special_tokens=False).input_ids
        assert encode_prompt(turns, tokenizer=tokenizer, template="tokenizer").input_ids == theirs
