"""``<image>`` and pad tokens by name, what is refused, and text that never becomes a control token."""

import contextlib
import json
import shutil

import pytest
from sentencepiece import sentencepiece_model_pb2 as pb
from transformers import AutoTokenizer

from llava_moslora.errors import Refusal
from llava_moslora.text.conversation import text_encoder
from llava_moslora.text.tokenizer import IMAGE_TOKEN, image_token_id, load_tokenizer


@pytest.mark.parametrize(("name", "grows", "pad"), [
    ("chatml", 1, "<|im_end|>"),  # the folder's own pad token is kept
    ("llama3", 0, "<pad>"),  # two reserved tokens are renamed
    ("internlm2", 1, "</s>"),
    ("llama2-legacy", 1, "<unk>"),  # LLaVA's choice for Vicuna
])  # fmt: skip
def test_image_and_pad(tiny_folder, tmp_path, name, grows, pad):
    before = AutoTokenizer.from_pretrained(tiny_folder(name))
    tokenizer = load_tokenizer(tiny_folder(name))
    assert len(tokenizer) == len(before) + grows
    assert tokenizer.pad_token == pad
    assert tokenizer.padding_side == "right"
    tokenizer.save_pretrained(tmp_path)
    for again in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(again) == len(tokenizer)
        assert image_token_id(again) == image_token_id(tokenizer)
        assert (again.pad_token, again.pad_token_id) == (pad, tokenizer.pad_token_id)
        assert (again.bos_token, again.eos_token) == (before.bos_token, before.eos_token)
        text = "hello <image><image>\nthe cat"
        assert again(text).input_ids == tokenizer(text).input_ids
    ids = tokenizer("the cat <image>", add_special_tokens=False).input_ids
    assert ids[:-1] == before("the cat ", add_special_tokens=False).input_ids
    assert ids[-1] == image_token_id(tokenizer)


def test_reserved_tokens_are_renamed_not_moved(tiny_folder):
    before = AutoTokenizer.from_pretrained(tiny_folder("llama3"))
    tokenizer = load_tokenizer(tiny_folder("llama3"))
    assert image_token_id(tokenizer) == before.convert_tokens_to_ids("<|reserved_special_token_0|>")
    assert tokenizer.pad_token_id == before.convert_tokens_to_ids("<|reserved_special_token_1|>")
    assert "<|reserved_special_token_0|>" not in tokenizer.get_vocab()


def edit(folder, target, **changes):
    """A copy of a tokenizer folder with other values in tokenizer_config.json; ``None`` takes a key out."""
    shutil.copytree(folder, target)
    config = json.loads((target / "tokenizer_config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def test_pad_is_appended_where_nothing_else_serves(tiny_folder, tmp_path):
    tokenizer = load_tokenizer(edit(tiny_folder("chatml"), tmp_path / "t", pad_token=None, unk_token=None))
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.pad_token_id == image_token_id(tokenizer) + 1


def test_llama31_pad_name_is_used(tiny_folder, tmp_path):
    folder = edit(tiny_folder("llama3"), tmp_path / "t")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|reserved_special_token_1|>", "<|finetune_right_pad_id|>"))
    assert load_tokenizer(folder).pad_token == "<|finetune_right_pad_id|>"


def test_old_folders_with_token_objects_and_a_special_tokens_map(tiny_folder, tmp_path):
    folder = edit(tiny_folder("llama2-legacy"), tmp_path / "t", bos_token=None, eos_token=None, unk_token=None)
    objects = {name: {"content": token, "lstrip": False} for name, token in
               [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]}  # fmt: skip
    (folder / "special_tokens_map.json").write_text(json.dumps(objects))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>")


def test_remote_code_is_never_run(tiny_folder, tmp_path):
    sentinel = tmp_path / "ran"
    folder = edit(tiny_folder("chatml"), tmp_path / "t", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (folder / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')")
    assert load_tokenizer(folder).eos_token == "<|im_end|>"
    assert not sentinel.exists()


def test_refusals(tmp_path, tiny_folder):
    with pytest.raises(Refusal, match=r"\[K-TOKENIZER\] .*nope: there is no such folder") as refusal:
        load_tokenizer(tmp_path / "nope")
    assert refusal.value.exit_status == 3
    with pytest.raises(Refusal, match=r"holds neither tokenizer.json nor tokenizer.model; found an empty folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 40)
    with pytest.raises(Refusal, match=r"tokenizer.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(Refusal, match=r"tokenizer.json: not valid JSON; .*download it again"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(Refusal, match=r"tokenizer.json: not a JSON object; found list"):
        load_tokenizer(tmp_path)
    stock = AutoTokenizer.from_pretrained(tiny_folder("chatml"))
    with pytest.raises(Refusal, match="the tokenizer has no <image> token"):
        image_token_id(stock)


def edit_state(change):
    def call(folder):
        state = json.loads((folder / "tokenizer.json").read_text())
        change(state)
        (folder / "tokenizer.json").write_text(json.dumps(state))

    return call


def edit_config(**changes):
    def call(folder):
        config = json.loads((folder / "tokenizer_config.json").read_text()) | changes
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    return call


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
WRONG = [  # what is done to the folder, the file or key in the message
    (edit_state(lambda s: s["model"].update(type="Newer")), "the tokenizers library cannot load it; found .*; fix: "),
    (edit_state(lambda s: s["model"].pop("vocab")), "the tokenizers library cannot load it"),
    (edit_state(lambda s: s["model"].pop("merges")), "the tokenizers library cannot load it"),
    (edit_state(lambda s: s["model"].update(merges=5)), "the tokenizers library cannot load it"),
    (edit_state(lambda s: s["model"].update(merges=[5])), "the tokenizers library cannot load it"),
    (edit_state(lambda s: s["model"].update(merges=[["a"]])), "the tokenizers library cannot load it"),
    (edit_state(lambda s: s.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
                                                  "invert": False})), "the tokenizers library cannot load it"),
    (edit_state(lambda s: s.update(model=[])), "tokenizer.json: not a tokenizer of the tokenizers library"),
    (edit_state(lambda s: s["added_tokens"][0].pop("content")), "tokenizer.json:added_tokens: not a complete token"),
    (edit_state(lambda s: s["added_tokens"].append("<x>")), "added_tokens: not a complete token; found <"),
    (edit_config(pad_token=5), "tokenizer_config.json:pad_token: not usable; found 5; expected a token"),
    (edit_config(eos_token={}), r"tokenizer_config.json:eos_token: not usable; found \{\}"),
    (edit_config(eos_token=["a"]), r"tokenizer_config.json:eos_token: not usable; found \['a'\]"),
    (edit_config(model_max_length="long"), "tokenizer_config.json:model_max_length: not usable; found long"),
    (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json: not a JSON object; found list"),
    (lambda f: (f / "tokenizer_config.json").write_text(POINTER), "tokenizer_config.json: not valid JSON"),
    (lambda f: (f / "special_tokens_map.json").write_text("null"), "special_tokens_map.json: not a JSON object"),
    (lambda f: (f / "tokenizer.json").write_text("[" * 10**5), "tokenizer.json: not valid JSON"),
    (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe{\0"), "tokenizer.json: not UTF-8"),
    (lambda f: (f / "chat_template.jinja").write_bytes(b"caf\xe9"), "chat_template.jinja: cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_half_downloaded_and_newer_files_are_refused(tiny_folder, tmp_path, case):
    change, message = WRONG[case]
    folder = shutil.copytree(tiny_folder("chatml"), tmp_path / "t")
    change(folder)
    with pytest.raises(Refusal, match=rf"K-TOKENIZER\] .*{message}") as refusal:
        load_tokenizer(folder)
    assert refusal.value.fix or "not a tokenizer" in message


def _sentencepiece(pieces: list[str], **numbers: int) -> pb.ModelProto:
    model = pb.ModelProto()
    for number, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(number), type=3 if piece.startswith("<") else 1)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = pb.TrainerSpec.BPE, True
    for name, number in ({"unk_id": 0, "bos_id": 1, "eos_id": 2} | numbers).items():
        setattr(model.trainer_spec, name, number)
    return model


@pytest.mark.parametrize(
    ("pieces", "numbers", "before", "message"),
    [
        (["a", "b"], {}, b"", None),
        (["ab"], {}, b"ab", r"tokenizer.model:piece 3: an invalid piece; found .*expected UTF-8"),
        (["a", "x" * 5000], {}, b"", r"tokenizer.model:piece 4: an invalid piece; .*at most 1024 characters"),
        (["a", "a"], {}, b"", r"a piece occurs twice"),
        (
            ["a"],
            {"bos_id": 4},
            b"",
            r"tokenizer.model:bos_id: the bos token is not one of the pieces; found 4; .*0 to 3",
        ),
        (["a"], {"eos_id": 2**31 - 1}, b"", r"tokenizer.model:eos_id: the eos token is not one of the pieces"),
    ],
)
def test_sentencepiece_models_that_cannot_be(tmp_path, pieces, numbers, before, message):
    content = _sentencepiece(["<unk>", "<s>", "</s>", *pieces], **numbers).SerializeToString()
    (tmp_path / "tokenizer.model").write_bytes(content.replace(before, b"\xff\xfe") if before else content)
    with pytest.raises(Refusal, match=message) if message else contextlib.nullcontext():
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["llama2-legacy", "llama2-always", "llama2-first"])
def test_merges_into_control_tokens_are_dropped(tiny_folder, tiny, name):
    """The tiny Llama-2 has the merges ``<`` + ``s>`` and ``</`` + ``s>``, with which stock text becomes ``<s>``."""
    stock = AutoTokenizer.from_pretrained(tiny_folder(name))
    assert 1 in stock("<s>", add_special_tokens=False, split_special_tokens=True).input_ids
    ids = text_encoder(tiny(name))("<s></s>", "joined")
    assert not {1, 2} & set(ids)
    assert tiny(name).decode(ids) == "<s></s>"


@pytest.mark.parametrize(("name", "start", "fresh"), [
    ("llama2-legacy", "▁a", "▁a"), ("llama2-always", "▁a", "▁a"), ("llama2-first", "▁a", "a"), ("chatml", "a", "a"),
])  # fmt: skip
def test_dummy_prefix_by_place(tiny, name, start, fresh):
    encode = text_encoder(tiny(name))
    got = [tiny(name).convert_ids_to_tokens(encode("a", place)) for place in ("start", "fresh", "joined")]
    assert got == [[start], [fresh], ["a"]]


def test_a_stock_call_leaves_no_trace(tiny):
    tokenizer = tiny("chatml")
    before = text_encoder(tokenizer)("hello <|im_end|> the cat", "fresh")
    tokenizer(["hello the cat", "x"], padding="max_length", max_length=3, truncation=True)
    assert text_encoder(tokenizer)("hello <|im_end|> the cat", "fresh") == before
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id]
    assert tokenizer(IMAGE_TOKEN).input_ids == [image_token_id(tokenizer)]
