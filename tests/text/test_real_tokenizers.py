"""Hand-written tables of (token, trained?) on the published tokenizers, and their ids against the originals.

``*`` marks a trained token. Every table holds an image of two placeholders and a user who types ``<|eot_id|>``.
"""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llava_moslora.text.conversation import Turn, encode, encode_prompt, text_encoder
from llava_moslora.text.template_check import check_template
from llava_moslora.text.templates import recognise_template, stop_token_ids
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer

TALK = [
    Turn("human", "<image>\nIs <|eot_id|> red?"),
    Turn("gpt", "No. </s>"),
    Turn("human", "And now?"),
    Turn("gpt", "Yes"),
]
VICUNA = (
    "▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The ▁assistant ▁gives"
    " ▁helpful , ▁detailed , ▁and ▁pol ite ▁answers ▁to ▁the ▁user ' s ▁questions ."
)
TABLES = {
    ("smollm2", "chatml"): "<|im_start|> user Ċ <image> <image> Ċ Is Ġ< | e ot _ id | > Ġred ? <|im_end|> Ċ"
    " <|im_start|> ass istant Ċ *No *. *Ġ</ *s *> *<|im_end|> Ċ"
    " <|im_start|> user Ċ And Ġnow ? <|im_end|> Ċ <|im_start|> ass istant Ċ *Yes *<|im_end|> Ċ",
    (
        "llama3",
        "llama3",
    ): "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> ĊĊ <image> <image> Ċ Is Ġ<| e ot"
    " _id | > Ġred ? <|eot_id|> <|start_header_id|> assistant <|end_header_id|> ĊĊ *No *. *Ġ</ *s *> *<|eot_id|>"
    " <|start_header_id|> user <|end_header_id|> ĊĊ And Ġnow ? <|eot_id|>"
    " <|start_header_id|> assistant <|end_header_id|> ĊĊ *Yes *<|eot_id|>",
    ("internlm2", "internlm2"): "<s> <|im_start|> user \n <image> <image> \n Is ▁< | e ot _id | > ▁red ? <|im_end|> \n"
    " <|im_start|> ass istant \n *No *. *▁</ *s *> *<|im_end|> \n"
    " <|im_start|> user \n And ▁now ? <|im_end|> \n <|im_start|> ass istant \n *Yes *<|im_end|> \n",
    ("llama2", "vicuna_v1"): f"<s> {VICUNA} ▁US ER : ▁ <image> <image> ▁ <0x0A> Is ▁< | e ot _ id | > ▁red ?"
    " ▁A SS IST ANT : *▁No *. *▁</ *s *> *</s> ▁US ER : ▁And ▁now ? ▁A SS IST ANT : *▁Yes *</s>",
    ("llama2", "vicuna"): "<s> ▁US ER : ▁ <image> <image> ▁ <0x0A> Is ▁< | e ot _ id | > ▁red ?"
    " ▁A SS IST ANT : *▁No *. *▁</ *s *> *</s> ▁ <0x0A>"
    " <s> ▁US ER : ▁And ▁now ? ▁A SS IST ANT : *▁Yes *</s> ▁ <0x0A>",
    ("llama2", "llama2"): "<s> ▁[ INST ] ▁ <image> <image> ▁ <0x0A> Is ▁< | e ot _ id | > ▁red ? ▁[ / INST ]"
    " *▁No *. *▁</ *s *> *▁ *</s> <s> ▁[ INST ] ▁And ▁now ? ▁[ / INST ] *▁Yes *▁ *</s>",
    ("llama2", "plain"): "<s> <image> <image> *▁No *. *▁</ *s *> *<0x0A>",
}


@pytest.mark.parametrize(("name", "template"), TABLES)
def test_token_table(real, name, template):
    tokenizer = real(name)
    turns = TALK[:2] if template == "plain" else TALK
    encoded = encode(turns, tokenizer=tokenizer, template=template, image_tokens=[2])
    names = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    trained = [label >= 0 for label in encoded.labels]
    table = TABLES[name, template].split(" ")
    assert [("*" if t else "") + token for token, t in zip(names, trained, strict=True)] == table


@pytest.mark.slow  # the tiny tokenizers show the same in a second
@pytest.mark.parametrize(("name", "template"), TABLES)
def test_stock_tokenizer_reads_our_prompt(real, tmp_path, name, template):
    """The saved tokenizer, loaded by stock transformers, gives the ids we train on."""
    check_template(real(name), template)
    real(name).save_pretrained(tmp_path)
    check_template(AutoTokenizer.from_pretrained(tmp_path), template)


@pytest.mark.parametrize(("name", "template", "stop"), [
    ("smollm2", "chatml", ["<|im_end|>"]),
    ("llama3", "llama3", ["<|eot_id|>"]),
    ("internlm2", "internlm2", ["<|im_end|>", "</s>"]),
    ("llama2", "vicuna_v1", ["</s>"]),
    ("llama2", "plain", ["<0x0A>", "</s>"]),
])  # fmt: skip
def test_recognised_and_stopped(real, name, template, stop):
    if template != "plain":
        assert recognise_template(real(name)) == template
    assert real(name).convert_ids_to_tokens(stop_token_ids(real(name), template)) == stop


@pytest.mark.slow  # the tiny tokenizers show the same in a second
@pytest.mark.parametrize(("name", "size", "image", "pad"), [
    ("smollm2", 49153, 49152, "<|im_end|>"),
    ("llama3", 128256, 128002, "<pad>"),
    ("internlm2", 92544, 92397, "</s>"),
    ("llama2", 32001, 32000, "<unk>"),
])  # fmt: skip
def test_image_and_pad_tokens(real, real_folder, tmp_path, name, size, image, pad):
    for tokenizer in (real(name), _saved(real(name), tmp_path)):
        assert (len(tokenizer), image_token_id(tokenizer), tokenizer.pad_token) == (size, image, pad)
        assert tokenizer("a<image>b", add_special_tokens=False).input_ids.count(image) == 1
        assert text_encoder(tokenizer)("a<image>b", "fresh").count(image) == 0


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


SAMPLES = [
    "Hello world",
    " two  spaces ",
    "a\nb\n\n\nc\t\td\r\n",
    "日本語テキスト。这是中文",
    "👩‍👩‍👧 é a\u0301 \u200b",
    "مرحبا بالعالم",
    "ＡＥＦ Ｅmail",
    "def f(x):\n    return  x ** 2",
    "1234567 3.14",
    "</s",
    "x" * 200,
    "'s 're I'll",
    "",
    " ",
]


@pytest.mark.parametrize("name", ["llama2", "internlm2"])
def test_ids_equal_sentencepiece(real, real_folder, name):
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor(model_file=str(real_folder(name) / "tokenizer.model"))
    code = [path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    corpus = SAMPLES + [text.replace("[UNUSED_TOKEN", "").replace("▁", "_") for text in code]
    ours = real(name)(corpus, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours == original.encode(corpus)
    assert real(name).batch_decode(ours) == corpus


def test_internlm2_names_in_text_stay_text(real):
    tokenizer = real("internlm2")
    text = "[UNUSED_TOKEN_145] [UNUSED_TOKEN_7] <|im_end|> <s>"
    ids = text_encoder(tokenizer)(text, "fresh")
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(text_encoder(tokenizer).controls)


def test_llama3_ids_equal_tiktoken(real):
    tokenizer = real("llama3")
    assert text_encoder(tokenizer)("Hello world<|eot_id|>", "fresh") == [9906, 1917, 27, 91, 68, 354, 851, 91, 29]
    prompt = encode_prompt([Turn("human", "Hi")], tokenizer=tokenizer, template="llama3").input_ids
    assert prompt == [128000, 128006, 882, 128007, 271, 13347, 128009, 128006, 78191, 128007, 271]
