"""Random models and records for benchmarks/train.py, made once and read by every run like real ones.

LLaMA-3-8B is drawn on the GPU and copied into memory-mapped files, several at a time: 16 GB in seconds on a RAM disk.
Every character of a record outside of control tokens is one token, so that lengths are exact.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from llava_moslora.config import DataSettings
from llava_moslora.data.prepare import prepare
from llava_moslora.devices import ALLOCATOR
from llava_moslora.models.towers import tokens_per_image
from llava_moslora.models.vision import read_vision_config
from llava_moslora.text.conversation import IGNORE_INDEX, Turn, encode
from llava_moslora.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B |= {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "bos_token_id": None}
LLAMA_3_8B |= {"max_position_embeddings": 8192}
CLIP_L_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L_336 |= {"image_size": 336, "patch_size": 14}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 400, "bos_token_id": None, "max_position_embeddings": 8192}
LENGTHS = ("uniform", "ragged", "text")
# tokens of a record, labels included, and labels
SIZES = {"uniform": (2048, 200), "text": (4096, 200), "tiny": (96, 12)}
INDEX = "model.safetensors.index.json"
IMAGES = 8  # different ones; more would only fill the disk
IMAGE_SIZE = 336
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")  # the tokenizer merges none of them
TEMPLATE = "chatml"
THREADS = 8


def make_models(folder: Path, llm: Path, *, tiny: bool, layers: int | None) -> None:
    """``clip/ projector.safetensors images/`` in ``folder`` and the LLM in ``llm``, of its first N layers with
    ``layers``, unless they are there."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny import tiny_tokenizer, write_clip, write_projector  # the tests' tokenizer serves here

    folder.mkdir(parents=True, exist_ok=True)
    if not (llm / INDEX).exists():
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(llm)
        shape = (TINY if tiny else LLAMA_3_8B) | ({} if layers is None else {"num_hidden_layers": layers})
        config = LlamaConfig(**shape, eos_token_id=tokenizer.eos_token_id, pad_token_id=None, dtype="bfloat16")
        write_random_llm(config, llm, device)
    if not (folder / "done").exists():
        with torch.device(device):
            write_clip(folder / "clip", **({} if tiny else CLIP_L_336))
        sizes = {} if tiny else {"vision": CLIP_L_336["hidden_size"], "llm": LLAMA_3_8B["hidden_size"]}
        write_projector(folder / "projector.safetensors", **sizes)
        write_images(folder / "images")
        (folder / "done").touch()


def write_random_llm(config: LlamaConfig, folder: Path, device: str) -> None:
    """One file per layer and one for the rest: the GPU never holds the whole model. ``INDEX`` is written last."""
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        file = f"layer-{parts[2]}" if parts[1] == "layers" else "rest"
        files.setdefault(f"{file}.safetensors", {})[name] = shape
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda file: write_random_tensors(files[file], folder / file, device), files))
    index = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def write_random_tensors(shapes: dict[str, tuple[int, ...]], file: Path, device: str) -> None:
    """A safetensors file of bfloat16: norms are 1, everything else normal with a deviation of 0.02."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.flush()
        os.posix_fallocate(out.fileno(), 0, start + end)  # a full disk is an error here, and a crash below
    mapped = torch.from_file(str(file), shared=True, size=start + end, dtype=torch.uint8)
    for name, shape in shapes.items():
        begin, stop = (start + offset for offset in header[name]["data_offsets"])
        drawn = torch.empty(shape, device=device, dtype=torch.bfloat16)
        drawn.fill_(1) if name.endswith("norm.weight") else drawn.normal_(std=0.02)
        mapped[begin:stop].view(torch.bfloat16).view(shape).copy_(drawn)


def write_images(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(IMAGES):  # blurred: noise would take longer to decode than a photograph
        noise = Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        noise.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg")


def max_length(lengths: str) -> int:
    return SIZES["text"][0] if lengths == "text" else SIZES["uniform"][0]


def data_settings(file: Path, folder: Path, lengths: str, *, images: bool) -> DataSettings:
    """Of every row; ``images``: for a LLaVA, not for an LLM alone."""
    return DataSettings(
        data_path=[str(file)],
        image_folder=str(folder / "images") if images else None,
        model_max_length=max_length(lengths),
        data_cache=str(folder / "cache"),
    )


def make_data(file: Path, folder: Path, llm: Path, lengths: str, count: int, *, tiny: bool, images: bool) -> None:
    """``count`` records in ``file``, tokenised into ``folder/cache``; the first ones are the same for every count.
    ``images``: for a LLaVA, not for an LLM alone."""
    tokenizer = load_tokenizer(llm, images=images)
    patches = tokens_per_image(read_vision_config(str(folder / "clip"))) if images else 0
    if not file.exists():
        sizes = record_sizes(lengths, count, patches, tiny)
        file.write_text(json.dumps(records(sizes, tokenizer, patches)))
    settings = data_settings(file, folder, lengths, images=images)
    dataset = prepare(settings, tokenizer=tokenizer, template=TEMPLATE, tokens_per_image=patches)
    assert len(dataset) == count, f"{len(dataset)} records of {count}"
    if lengths != "ragged":
        tokens, labels = SIZES["tiny" if tiny else lengths]
        assert set(dataset["length"][:]) == {tokens} and set(dataset["trained"][:]) == {labels}


def record_sizes(lengths: str, count: int, patches: int, tiny: bool) -> list[tuple[bool, int, int]]:
    """(has an image, tokens, of them labels) of each record.

    Ragged ones are drawn to look like LLaVA's 665K mix: 6 % are long texts, the rest have an image and a text whose
    logarithm is normal with a median of 230 tokens, of which two fifths are answers.
    """
    if lengths != "ragged":
        return [(lengths != "text", *SIZES["tiny" if tiny else lengths])] * count
    random = np.random.default_rng(0)
    sizes = []
    for _ in range(count):
        image = bool(random.random() >= 0.06)
        text = float(random.lognormal(math.log(230 if image else 1000), 0.8)) / (20 if tiny else 1)
        longest = SIZES["uniform"][0] - patches * image
        text = int(min(max(text, 50), longest))
        sizes.append((image, text + patches * image, max(8, int(0.4 * text))))
    return sizes


def records(sizes: list[tuple[bool, int, int]], tokenizer, patches: int) -> list[dict]:
    """LLaVA's JSON of records with exactly those sizes."""
    random = np.random.default_rng(1)
    fixed_sizes = {image: _fixed_size(image, tokenizer, patches) for image in {image for image, _, _ in sizes}}
    rows = []
    for index, (image, tokens, labels) in enumerate(sizes):
        fixed, fixed_labels = fixed_sizes[image]
        answer = labels - fixed_labels
        question = tokens - fixed - answer
        assert answer > 0 and question > 0, f"a record of {tokens} tokens and {labels} labels is too short"
        texts = ("".join(random.choice(LETTERS, size=size)) for size in (question, answer))
        turns = [{"from": sender, "value": text} for sender, text in zip(("human", "gpt"), texts, strict=True)]
        row = {"id": str(index), "conversations": turns}
        if image:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            row["image"] = f"{index % IMAGES}.jpg"
        rows.append(row)
    return rows


def _fixed_size(image: bool, tokenizer, patches: int) -> tuple[int, int]:
    """Tokens and labels of a record without the characters of its question and answer."""
    turns = [Turn("human", "<image>\nQ" if image else "Q"), Turn("gpt", "A")]
    encoded = encode(turns, tokenizer=tokenizer, template=TEMPLATE, image_tokens=[patches] * image)
    return len(encoded.input_ids) - 2, sum(label != IGNORE_INDEX for label in encoded.labels) - 1


def facts() -> dict:
    """The device and the versions that a result states."""
    packages = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "liger_kernel", "triton")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    allocator = {name: os.environ[name] for name in ALLOCATOR if name in os.environ}
    return {"device": device, "python": platform.python_version(), "versions": versions, "allocator": allocator}
