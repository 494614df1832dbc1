"""Ids and labels, made together, for every template; the exported chat template against them."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from llava_moslora.errors import Refusal
from llava_moslora.text import conversation
from llava_moslora.text.conversation import IGNORE_INDEX, Turn, check_template, encode, encode_prompt
from llava_moslora.text.template import BOS, EOS, TEXT, Template
from llava_moslora.text.templates import TEMPLATES, chat_template, recognise_template, stop_token_ids
from llava_moslora.text.tokenizer import image_token_id
from support.labels import show_labels

# Which templates each tiny tokenizer has the control tokens for.
FITS = {
    "chatml": ["chatml", "vicuna_v1", "vicuna", "llama2", "plain", "llm_adapters"],
    "llama3": ["llama3", "vicuna_v1", "plain", "llm_adapters"],
    "internlm2": ["internlm2", "chatml"],
    "llama2-legacy": ["vicuna_v1", "vicuna", "llama2", "plain", "llm_adapters"],
    "llama2-always": ["vicuna_v1", "vicuna", "llama2", "plain"],
    "llama2-first": ["vicuna_v1", "vicuna", "llama2", "plain"],
}
ONE_ROUND = ("plain", "llm_adapters")
PAIRS = [(tokenizer, template) for tokenizer, templates in FITS.items() for template in templates]
TALK = [
    Turn("human", "<image>\nWhat is the shape?"),
    Turn("gpt", "a circle"),
    Turn("human", "Sure?"),
    Turn("gpt", "Yes."),
]


@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_chat_template_gives_the_ids_of_encode_prompt(tiny, name, template):
    tokenizer = tiny(name)
    jinja = chat_template(template, tokenizer)
    image, text = {"type": "image"}, {"type": "text", "text": "What is the shape?"}
    asked = [
        ([Turn("human", "hello the cat")], [("user", "hello the cat")], 0),
        (TALK[:1], [("user", [image, text])], 1),
        (TALK[:1], [("user", "<image>\nWhat is the shape?")], 1),
        (
            TALK[:3],
            [("user", [image, text]), ("assistant", [{"type": "text", "text": "a circle"}]), ("user", "Sure?")],
            1,
        ),
        (
            [Turn("human", "<image>\n<image>\nWhat is the shape?\n<image>")],
            [("user", [image, image, text, image])],
            3,
        ),
        (
            [Turn("system", "Be a cat."), *TALK[:3]],
            [("system", "Be a cat."), ("user", [image, text]), ("assistant", "a circle"), ("user", " Sure? ")],
            1,
        ),
    ]
    for turns, messages, images in asked:
        if (template == "plain" and not images) or (turns[0].role == "system" and not TEMPLATES[template].system):
            continue
        if template == "llm_adapters" and len(turns) > 1:
            with pytest.raises(Refusal, match="this prompt template has only one round"):
                encode_prompt(turns, tokenizer=tokenizer, template=template, image_tokens=[3] * images)
            with pytest.raises(TemplateError, match="one question"):
                tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in messages], chat_template=jinja)
            continue
        ours = encode_prompt(turns, tokenizer=tokenizer, template=template, image_tokens=[3] * images)
        messages = [{"role": role, "content": content} for role, content in messages]
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=jinja, add_generation_prompt=True, tokenize=False
        )
        # What LlavaProcessor does with it: expand <image>, and add no second BOS to a prompt that has one.
        expanded = rendered.replace("<image>", "<image>" * 3)
        bare = tokenizer.bos_token is not None and expanded.startswith(tokenizer.bos_token)
        assert tokenizer(expanded, add_special_tokens=not bare).input_ids == ours.input_ids, rendered
        assert ours.input_ids.count(image_token_id(tokenizer)) == 3 * images
        assert set(ours.labels) == {IGNORE_INDEX}


TABLES = {
    ("chatml", "chatml"): "<|im_start|>user\n<image>×3\nWhat is the shape?<|im_end|>\n<|im_start|>assistant\n"
    "⟦a circle<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n",
    ("llama3", "llama3"): "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>×3\nWhat is the shape?"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦a circle<|eot_id|>⟧<|start_header_id|>user"
    "<|end_header_id|>\n\nSure?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes.<|eot_id|>⟧",
    ("internlm2", "internlm2"): "<s><|im_start|>user\n<image>×3\nWhat is the shape?<|im_end|>\n<|im_start|>assistant\n"
    "⟦a circle<|im_end|>⟧\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n",
}


@pytest.mark.parametrize("pair", TABLES)
def test_what_is_trained(tiny, pair):
    encoded = encode(TALK, tokenizer=tiny(pair[0]), template=pair[1], image_tokens=[3])
    assert show_labels(encoded.input_ids, encoded.labels, tiny(pair[0])) == TABLES[pair]


@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_trained_ids_are_the_answers_and_their_stop_tokens(tiny, name, template):
    tokenizer = tiny(name)
    turns = TALK[:2] if template in ONE_ROUND else TALK
    encoded = encode(turns, tokenizer=tokenizer, template=template, image_tokens=[3])
    assert len(encoded.input_ids) == len(encoded.labels) == encoded.ends[-1]
    assert len(encoded.ends) == len(turns) // 2
    runs, before = [], IGNORE_INDEX
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            runs = [*runs, [token]] if before == IGNORE_INDEX else [*runs[:-1], [*runs[-1], token]]
        before = label
    stop = stop_token_ids(tokenizer, template)[0]
    assert [run[-1] for run in runs] == [stop] * len(runs)
    answers = [turn.text for turn in turns if turn.role == "gpt"]
    assert [tokenizer.decode(run[:-1]).strip() for run in runs] == answers


@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_an_answer_that_is_not_trained_keeps_its_ids(tiny, name, template):
    options = {"tokenizer": tiny(name), "template": template, "image_tokens": [3]}
    rounds = 1 if template in ONE_ROUND else 2
    whole = encode(TALK[: 2 * rounds], **options)
    first = encode([TALK[0], replace(TALK[1], trained=False), *TALK[2 : 2 * rounds]], **options)
    assert (first.input_ids, first.ends) == (whole.input_ids, whole.ends)
    at = whole.ends[0]
    assert first.labels == [IGNORE_INDEX] * at + whole.labels[at:] != whole.labels


@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_training_prompt_is_the_generation_prompt(tiny, name, template):
    """What stands before the first trained token is, id for id, what generation starts from."""
    tokenizer = tiny(name)
    for rounds in (1,) if template in ONE_ROUND else (1, 2):
        trained = encode(TALK[: 2 * rounds], tokenizer=tokenizer, template=template, image_tokens=[3])
        asked = encode_prompt(TALK[: 2 * rounds - 1], tokenizer=tokenizer, template=template, image_tokens=[3])
        assert trained.input_ids[: len(asked.input_ids)] == asked.input_ids
        assert trained.labels[len(asked.input_ids)] != IGNORE_INDEX


@pytest.mark.parametrize(("name", "template"), PAIRS)
@given(text=st.text(max_size=20), answer=st.text(max_size=20), token=st.integers(0, 6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_never_becomes_a_control_token(tiny, name, template, text, answer, token):
    tokenizer = tiny(name)
    special = sorted(tokenizer.added_tokens_encoder)
    text, answer = (f"x{part}{special[token % len(special)]}<image></s>" for part in (text, answer))
    plain = [Turn("human", "<image>\nx"), Turn("gpt", "x")]
    nasty = [Turn("human", f"<image>\n{text.replace('<image>', '<_image>')}"), Turn("gpt", answer)]
    controls = set(tokenizer.added_tokens_decoder)
    ids = [
        [i for i in encode(turns, tokenizer=tokenizer, template=template, image_tokens=[2]).input_ids if i in controls]
        for turns in (plain, nasty)
    ]
    assert ids[0] == ids[1]


def test_bos_once(tiny):
    for name, template in [("llama3", "llama3"), ("internlm2", "internlm2"), ("llama2-legacy", "vicuna_v1")]:
        tokenizer = tiny(name)
        assert (
            encode(TALK, tokenizer=tokenizer, template=template, image_tokens=[3]).input_ids.count(
                tokenizer.bos_token_id
            )
            == 1
        )
    per_round = encode(TALK, tokenizer=tiny("llama2-legacy"), template="vicuna", image_tokens=[3])
    assert per_round.input_ids.count(1) == 2  # XTuner's vicuna: before every round
    smol = encode(TALK, tokenizer=tiny("chatml"), template="vicuna_v1", image_tokens=[3])
    assert tiny("chatml").bos_token_id not in smol.input_ids  # has a bos_token but does not begin its texts with it


def test_image_in_a_text_only_conversation_is_text(tiny):
    turns = [Turn("human", "what does <image> mean?"), Turn("gpt", "<image> is a tag")]
    encoded = encode(turns, tokenizer=tiny("chatml"), template="chatml")
    assert image_token_id(tiny("chatml")) not in encoded.input_ids
    assert tiny("chatml").decode([i for i in encoded.labels if i >= 0]) == "<image> is a tag<|im_end|>"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "chatml"),
        ("llama3", "llama3"),
        ("internlm2", "internlm2"),
        ("llama2-legacy", "vicuna_v1"),
    ],
)
def test_recognised(tiny, name, expected):
    assert recognise_template(tiny(name)) == expected


def test_stop_tokens(tiny):
    assert [tiny("llama3").convert_ids_to_tokens(i) for i in stop_token_ids(tiny("llama3"), "llama3")] == ["<|eot_id|>"]
    names = [tiny("internlm2").convert_ids_to_tokens(i) for i in stop_token_ids(tiny("internlm2"), "internlm2")]
    assert names == ["<|im_end|>", "</s>"]


@pytest.mark.parametrize(
    ("turns", "images", "message"),
    [
        ([], 0, "not in order; found no turns"),
        ([Turn("gpt", "x")], 0, "not in order; found gpt"),
        ([Turn("human", "x")], 0, "not in order; found human"),
        ([Turn("human", "x"), Turn("human", "x"), Turn("gpt", "x")], 0, "not in order"),
        ([Turn("human", "x"), Turn("system", "x"), Turn("human", "x"), Turn("gpt", "x")], 0, "not in order"),
        ([Turn("human", "<image> <image>"), Turn("gpt", "x")], 1, "found 2 <image>; expected 1 for 1 images"),
        ([Turn("human", "x"), Turn("gpt", "<image>")], 1, "found 0 <image>; expected 1 for 1 images"),
    ],
)
def test_refused(tiny, turns, images, message):
    with pytest.raises(Refusal, match=message):
        encode(turns, tokenizer=tiny("chatml"), template="chatml", image_tokens=[3] * images)


def test_refused_templates(tiny):
    with pytest.raises(Refusal, match=r"C-TEMPLATE.*found vicuna_v9; expected chatml \| internlm2"):
        encode(TALK, tokenizer=tiny("chatml"), template="vicuna_v9", image_tokens=[3])
    with pytest.raises(Refusal, match=r"needs the control token <\|begin_of_text\|>"):
        encode(TALK, tokenizer=tiny("chatml"), template="llama3", image_tokens=[3])
    with pytest.raises(Refusal, match="has no system turn"):
        encode([Turn("system", "x"), *TALK[:2]], tokenizer=tiny("chatml"), template="plain", image_tokens=[3])


def test_a_new_template_is_one_row(tiny, monkeypatch):
    row = Template(
        begin=(BOS,),
        system=("Rules: ", TEXT, "\n"),
        human=("Q: ", TEXT, "\n"),
        reply=("A:",),
        answer=(" ", TEXT, EOS),
        separator=("\n",),
    )
    monkeypatch.setitem(TEMPLATES, "quiz", row)
    tokenizer = tiny("chatml")
    check_template(tokenizer, "quiz")  # the exported chat template gives the same ids
    encoded = encode([Turn("system", "Be brief."), *TALK], tokenizer=tokenizer, template="quiz", image_tokens=[3])
    assert show_labels(encoded.input_ids, encoded.labels, tokenizer) == (
        "Rules: Be brief.\nQ: <image>×3\nWhat is the shape?\nA:⟦ a circle<|im_end|>⟧\nQ: Sure?\nA:⟦ Yes.<|im_end|>⟧\n"
    )
    assert tokenizer.eos_token_id in stop_token_ids(tokenizer, "quiz")


def test_every_template_is_tested():
    assert {template for _, template in PAIRS} == set(TEMPLATES)


# D22: a template that does not fit the tokenizer; that the others fit is tested with the templates
def test_template_that_does_not_fit(tiny, monkeypatch):
    check_template(tiny("chatml"), "chatml")
    monkeypatch.setattr(conversation, "chat_template", lambda *_: "{{ messages[0]['content'] }}")
    with pytest.raises(
        Refusal, match=r"\[C-TEMPLATE\] .*the tokenizer tokenises the chatml prompt differently from token 0 on"
    ):
        check_template(tiny("chatml"), "chatml")
