"""The names of caches: what decides them, and that a cache of an earlier version is found by today's code."""

from types import SimpleNamespace
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from llava_moslora.config import DataSettings
from llava_moslora.data.cache import Preparation, cache_key
from llava_moslora.data.sources.source import Source
from llava_moslora.errors import Refusal

# Of the files and the tokenizer below, with CODE_VERSION 4. With other keys everybody tokenises again, and an old run
# is resumed only with --allow_change data: that needs a new CODE_VERSION and a reason. (4: since there are several
# record formats, turns that are not trained and a record's "system" are heeded in LLaVA's too.)
FILE_KEYS = {
    "chatml": "data_v1-5bfb60a5c53d29ac5c58",
    "llama3": "data_v1-de4b16a3bfd0be946a9b",
    "internlm2": "data_v1-f3146155f85e5b85e70c",
    "vicuna_v1": "data_v1-a05a3aae9ac88d216c02",
    "vicuna": "data_v1-81a95df3fd096be06160",
    "llama2": "data_v1-1bf8f17c96295d731744",
    "plain": "data_v1-5ab078f891b0d75671d3",
    "tokenizer": "data_v1-64632067c4e47ef0a69d",
}
SHARD_KEYS = {"chatml": "mix-_-dc87cca639ebc61a8861", "tokenizer": "mix-_-c6448fb99320263c4742"}


class Tokenizer:
    """What a key is made of, the same with every version of the tokenizers library."""

    def __init__(self):
        self.backend_tokenizer = SimpleNamespace(to_str=lambda: '{"model": {"type": "BPE"}}')
        self.special_tokens_map = {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
        names = ["<|im_start|>", "<|im_end|>", "<pad>"]
        self.added_tokens_decoder = {k: SimpleNamespace(content=name, special=True) for k, name in enumerate(names)}
        self.chat_template = "ChatML, written in Python"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        text = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages)
        return text + "<|im_start|>assistant\n" * add_generation_prompt


class FixedTimes(MemoryFileSystem):
    protocol = "fixed"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def info(self, path, **options):
        return super().info(path, **options) | {"mtime": 1.5}


def key(name, template="chatml", tokens_per_image=576, **settings):
    settings = DataSettings([str(name)], **settings)
    return cache_key(Preparation(Source(str(name)), settings, Tokenizer(), template, tokens_per_image))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data v1.json"
    path.write_text('[{"id": 1}]')
    return path


@pytest.mark.parametrize("template", FILE_KEYS)
def test_keys_of_files_are_those_of_earlier_versions(file, template):
    assert key(file, template) == FILE_KEYS[template]


@pytest.mark.parametrize("template", SHARD_KEYS)
def test_keys_of_shards_are_those_of_earlier_versions(template):
    fsspec.register_implementation("fixed", FixedTimes, clobber=True)
    with fsspec.open("fixed://bucket/mix-0.tar", "wb") as shard:
        shard.write(b"not read for the key")
    assert key("fixed://bucket/mix-*.tar", template) == SHARD_KEYS[template]


def test_what_decides_no_token_is_not_in_the_key(file):
    others = {"image_folder": str(file.parent), "preprocessing_num_workers": 2, "follow_image_links": True}
    assert key(file, decode_images=True, data_order="shuffle", **others) == FILE_KEYS["chatml"]
    assert len({key(file), key(file, tokens_per_image=1), key(file, model_max_length=2047)}) == 3


def test_a_missing_file_has_no_key(tmp_path):
    with pytest.raises(Refusal, match=r"\[D-FILE\] .*nope.json: there is no such file; fix: check --data_path"):
        key(tmp_path / "nope.json")
