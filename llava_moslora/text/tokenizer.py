"""Loads the tokenizer of a language model folder and prepares it for images.

Two tokens are added, both found by *name*, never by a hard-coded id:

* ``<image>``, the placeholder that the data preparation repeats once per image feature. LLaMA-3 keeps unused reserved
  tokens, so one of those is renamed and no embedding row is added; to other tokenizers it is appended.
* a padding token: the folder's own, else a reserved one renamed to ``<pad>``, else the unknown token (LLaVA's choice
  for Vicuna), else an appended one.

Code from a model folder is never run: ``tokenizer.json`` or, where there is none, SentencePiece's ``tokenizer.model``
is read as data, without ``AutoTokenizer``.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import UnionType
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import naming, read_json
from llava_moslora.text.sentencepiece import read_sentencepiece

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
# Reserved token names of published tokenizers, in the order in which they are used.
RESERVED_TOKENS = (
    "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",  # LLaMA-3
    "[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]",  # InternLM2
)  # fmt: skip
# LLaMA-3.1 added a token whose only purpose is padding but does not name it as the pad token.
PAD_NAMES = (PAD_TOKEN, "<|finetune_right_pad_id|>")
LARGEST_VOCABULARY = 1 << 24  # the library allocates memory for every id up to the largest
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(folder: str | Path, *, images: bool = True) -> PreTrainedTokenizerFast:
    """The tokenizer in ``folder`` with an ``<image>`` token and a pad token; right padding.

    ``images=False`` for an LLM without a vision tower: ``<image>`` is not added, and if nothing else can pad, the
    end-of-text token does, so that no embedding row is added (padding has no label, and no token attends to it).

    ``save_pretrained`` followed by ``load_tokenizer`` (or by stock ``AutoTokenizer``) gives the same ids.

    Raises:
        Refusal: K-TOKENIZER, the folder or its tokenizer files are missing or unreadable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise Refusal("K-TOKENIZER", "there is no such folder", file=folder, fix="give the downloaded model folder")
    state, settings = _read_folder(folder)

    added = {token["content"]: token for token in _added_tokens(state, folder)}
    reserved = [name for name in RESERVED_TOKENS if name in added]
    if images and IMAGE_TOKEN not in added and reserved:
        _rename(state, added, reserved.pop(0), IMAGE_TOKEN)
    if settings["pad_token"] is None:
        settings["pad_token"] = next((name for name in PAD_NAMES if name in added), None)
    if settings["pad_token"] is None and reserved:
        _rename(state, added, reserved.pop(0), PAD_TOKEN)
        settings["pad_token"] = PAD_TOKEN
    if settings["pad_token"] is None:
        last_choice = None if images else settings["eos_token"]
        settings["pad_token"] = settings["unk_token"] or last_choice  # may be None still
    if IMAGE_TOKEN in added:
        added[IMAGE_TOKEN].update(special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)
    _forbid_merging_into(state, {name for name, token in added.items() if token["special"]})

    # Not with from_pretrained, which may rebuild the normaliser by class name or ask the hub whether this is a Mistral;
    # from a file, because an object would be copied.
    with NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        with naming(Path(file.name)):
            file.write(json.dumps(state, ensure_ascii=False))
            file.flush()
        try:
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=file.name, padding_side="right", clean_up_tokenization_spaces=False, **settings
            )
        except Exception as error:  # the Rust library raises bare Exceptions: an unknown model type, a bad pattern
            fix = "download it again; a tokenizer that is newer than the package needs pip install -U tokenizers"
            what = "the tokenizers library cannot load it"
            raise Refusal("K-TOKENIZER", what, file=folder, found=error, fix=fix) from error
    if images and IMAGE_TOKEN not in added:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, normalized=False, special=True)})
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of ``<image>``.

    Raises:
        Refusal: K-TOKENIZER, the tokenizer was not prepared by :func:`load_tokenizer`.
    """
    found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found is None or found == tokenizer.unk_token_id:
        where, fix = tokenizer.name_or_path or None, "load it with load_tokenizer"
        raise Refusal("K-TOKENIZER", "the tokenizer has no <image> token", file=where, fix=fix)
    return found


def _read_folder(folder: Path) -> tuple[dict, dict]:
    """The content of ``tokenizer.json``, and the constructor's settings from the files next to it."""
    config: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second one wins
        if (folder / name).is_file():
            config.update(read_json(folder / name, "K-TOKENIZER"))
    settings: dict = {name: _content(name, config.get(name), folder) for name in NAMED_TOKENS}
    if (limit := config.get("model_max_length")) is not None:
        settings["model_max_length"] = _of_type(int | float, "a number", "model_max_length", limit, folder)
    template = folder / "chat_template.jinja"
    settings["chat_template"] = _read_text(template) if template.is_file() else config.get("chat_template")

    if (folder / "tokenizer.json").is_file():
        state = read_json(folder / "tokenizer.json", "K-TOKENIZER")
        if not isinstance(state.get("model"), dict) or not isinstance(state.get("added_tokens"), list):
            raise Refusal("K-TOKENIZER", "not a tokenizer of the tokenizers library", file=folder / "tokenizer.json")
        state["truncation"] = state["padding"] = None  # some folders were saved during a batched call
    elif (folder / "tokenizer.model").is_file():
        begins = config.get("add_bos_token", True)
        state, named = read_sentencepiece(folder / "tokenizer.model", begins=begins)
        settings.update({name: token for name, token in named.items() if settings[name] is None})
    else:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder"
        what, fix = "the folder holds neither tokenizer.json nor tokenizer.model", "download the tokenizer's files too"
        raise Refusal("K-TOKENIZER", what, file=folder, found=found, fix=fix)
    return state, settings


def _added_tokens(state: dict, folder: Path) -> list[dict]:
    for token in state["added_tokens"]:
        complete = isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        if not complete or not isinstance(token.get("special"), bool):
            raise Refusal(
                "K-TOKENIZER", "not a complete token", file=folder / "tokenizer.json", key="added_tokens", found=token,
                expected="an object with id, content and special", fix="download it again",
            )  # fmt: skip
    vocabulary = state["model"].get("vocab")
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    for number in (*ids, *(token["id"] for token in state["added_tokens"])):
        if type(number) is not int or not 0 <= number < LARGEST_VOCABULARY:
            raise Refusal(
                "K-TOKENIZER", "an id out of range", file=folder / "tokenizer.json", key="vocab", found=number,
                expected=f"0 to {LARGEST_VOCABULARY - 1}", fix="download it again",
            )  # fmt: skip
    return state["added_tokens"]


def _content(name: str, token: object, folder: Path) -> str | None:
    token = token.get("content", token) if isinstance(token, dict) else token
    return None if token is None else _of_type(str, "a token, or an object with its content", name, token, folder)


def _of_type(kind: type | UnionType, expected: str, key: str, value: object, folder: Path) -> Any:
    """``value`` if it is of ``kind``."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise Refusal(
            "K-TOKENIZER", "not usable", file=folder / "tokenizer_config.json", key=key, found=value,
            expected=expected, fix="download it again",
        )  # fmt: skip
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        raise Refusal("K-TOKENIZER", "cannot be read", file=file, found=found, fix="download it again") from None


def _rename(state: dict, added: dict[str, dict], old: str, new: str) -> None:
    """Give the reserved token ``old`` the name ``new``; its id stays."""
    token = added.pop(old)
    token["content"] = new
    added[new] = token
    vocabulary = state["model"].get("vocab")
    if isinstance(vocabulary, dict) and old in vocabulary:
        vocabulary[new] = vocabulary.pop(old)


def _forbid_merging_into(state: dict, names: set[str]) -> None:
    """Drop the BPE merges that would build a control token out of ordinary text.

    Tokenizers converted from SentencePiece can hold such merges (``<`` + ``s>``), which would turn a user's text into a
    control token even with ``split_special_tokens``.
    """
    model = state["model"]
    if model.get("type") == "BPE" and isinstance(model.get("merges"), list):
        # A merge is "a b" or ["a", "b"]; anything else is kept, for the library to refuse.
        model["merges"] = [
            merge
            for merge in model["merges"]
            if ("".join(map(str, merge)) if isinstance(merge, list) else str(merge).replace(" ", "", 1)) not in names
        ]
