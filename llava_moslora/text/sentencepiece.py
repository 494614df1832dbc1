"""Converts a SentencePiece BPE model (``tokenizer.model``) to the ``tokenizers`` library, with the same ids.

Vicuna and InternLM2 have no ``tokenizer.json``. transformers 5 can convert them, but loses Llama-2's dummy
prefix (``Hello`` gets a different id than ``▁Hello``) and turns ``<s>`` in a user's text into the control token.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as pb

from llava_moslora.errors import Refusal

SPACE = "▁"
# InternLM2's vocabulary calls its control tokens [UNUSED_TOKEN_141] to [UNUSED_TOKEN_146]; these are the names that its
# published tokenizer gives them.
INTERNLM2_NAMES = {
    "[UNUSED_TOKEN_141]": "<|plugin|>",
    "[UNUSED_TOKEN_142]": "<|interpreter|>",
    "[UNUSED_TOKEN_143]": "<|action_end|>",
    "[UNUSED_TOKEN_144]": "<|action_start|>",
    "[UNUSED_TOKEN_145]": "<|im_end|>",
    "[UNUSED_TOKEN_146]": "<|im_start|>",
}
LONGEST_PIECE = 1024  # characters; SentencePiece's own limit in training is 16, and control names are longer
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type


def read_sentencepiece(path: str | Path, *, begins: bool = True) -> tuple[dict, dict[str, str]]:
    """The content of an equivalent ``tokenizer.json``, and the names of its bos, eos and unk tokens.

    Control pieces, and the reserved ``[UNUSED_TOKEN_n]``, become special tokens; a dummy prefix is put at the start of
    every text between them, which is what LLaVA and XTuner get by tokenising such texts one by one.

    Args:
        begins: texts begin with the bos token.

    Raises:
        Refusal: K-TOKENIZER, not a SentencePiece BPE model with byte fallback and without text normalisation.
    """
    model = _read_model(Path(path))
    trainer = model.trainer_spec
    names = [INTERNLM2_NAMES.get(piece.piece, piece.piece) for piece in model.pieces]
    if len(set(names)) != len(names):
        raise Refusal("K-TOKENIZER", "a piece occurs twice", file=path)
    numbers = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unk": trainer.unk_id}
    for kind, number in numbers.items():
        if number >= len(names):
            what, expected = f"the {kind} token is not one of the pieces", f"0 to {len(names) - 1}, or -1 without one"
            raise Refusal("K-TOKENIZER", what, file=path, key=f"{kind}_id", found=number, expected=expected)
    named = {f"{kind}_token": names[number] for kind, number in numbers.items() if number >= 0}
    first = _bos_processor(named["bos_token"], trainer.bos_id) if begins and trainer.bos_id >= 0 else None
    return _tokenizer_state(model, names, named.get("unk_token"), first), named


def _read_model(path: Path) -> pb.ModelProto:
    model = pb.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        fix = "give the folder with tokenizer.json"
        raise Refusal("K-TOKENIZER", "not a SentencePiece model", file=path, fix=fix) from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != pb.TrainerSpec.BPE or not trainer.byte_fallback or normalizer.precompiled_charsmap:
        what = "only SentencePiece BPE models with byte fallback and no normalisation are supported"
        found = f"{pb.TrainerSpec.ModelType.Name(trainer.model_type)}, {normalizer.name}"
        raise Refusal("K-TOKENIZER", what, file=path, found=found)
    for number, piece in enumerate(model.pieces):
        if not isinstance(piece.piece, str) or len(piece.piece) > LONGEST_PIECE:  # bytes where it is not UTF-8
            raise Refusal(
                "K-TOKENIZER", "an invalid piece", file=path, key=f"piece {number}", found=piece.piece,
                expected=f"UTF-8 of at most {LONGEST_PIECE} characters", fix="download it again",
            )  # fmt: skip
    return model


def _tokenizer_state(model: pb.ModelProto, names: list[str], unknown: str | None, post_processor: dict | None) -> dict:
    """``names`` are those of the pieces, in the order of their ids."""
    vocabulary = {name: k for k, name in enumerate(names)}
    ordinary = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    added = [
        {
            "id": k, "content": names[k], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": piece.type != USER_DEFINED or piece.piece.startswith("[UNUSED_TOKEN_"),
        }
        for k, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    prefix = [{"type": "Prepend", "prepend": SPACE}] if model.normalizer_spec.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, spaces]},
        "pre_tokenizer": None,
        "post_processor": post_processor,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": _merges(ordinary, vocabulary),
        },
    }  # fmt: skip


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[list[str]]:
    """All merges of two pieces into an ordinary piece, best score first, as SentencePiece would apply them."""
    found = []
    for piece, score in scores.items():
        parts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        pairs = [(vocabulary[a], vocabulary[b], a, b) for a, b in parts if a in scores and b in scores]
        found += [(-score, *pair) for pair in sorted(pairs)]
    found.sort(key=lambda merge: merge[0])
    return [[a, b] for *_, a, b in found]


def _bos_processor(name: str, number: int) -> dict:
    """Puts the bos token before every text."""
    first = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
