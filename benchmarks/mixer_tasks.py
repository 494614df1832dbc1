"""The two tasks of benchmarks/mixer.py: a frozen model, training and held-out examples, a loss and an accuracy.

Images: the demo's CLIP tower classifies colour and shape (24 classes) in distorted EasyVQA images. Text: SmolLM2-135M
names the module of Python's standard library that a docstring's first line comes from.

Shapes: B examples, P patches, E vision width, T tokens, D LLM width, S answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import random
import sys
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from llava_moslora.errors import Refusal

sys.path.insert(0, str(Path(__file__).parents[1] / "playground"))

from easy_vqa import Knowledge, by_image

ROOT = Path(__file__).parents[1]
INPUTS = "bash playground/demo_inputs.sh"

# Not in every installation or version of Python
LEFT_OUT = {"cgi", "distutils", "idlelib", "lib2to3", "nntplib", "telnetlib", "tkinter", "turtle", "turtledemo"}


class Task(Protocol):
    """What the study trains on. ``model`` of the methods is what :meth:`fresh` returned, with adapters in it."""

    targets: str  # regular expression: the linears that get an adapter
    train_examples: int
    digest: str  # of the examples as the model takes them
    sizes: dict[str, int]  # examples of each part, and classes

    def fresh(self) -> nn.Module:
        """A copy of the frozen model."""

    def head(self) -> nn.Module | None:
        """What is trained beside the adapters; None: nothing."""

    def loss(self, model: nn.Module, head: nn.Module | None, examples: Tensor) -> Tensor:
        """Mean cross entropy of training examples, by their numbers (B)."""

    def measure(self, model: nn.Module, head: nn.Module | None, part: str) -> tuple[float, float]:
        """Mean cross entropy and accuracy on all examples of a part: "validation" (for tuning) or "test"."""


class Images:
    """24 classes in distorted images; a linear head on the mean of the patches after the penultimate layer.

    Raises:
        Refusal: D-MISSING, the data set is not there.
    """

    targets = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    train_examples, validation_examples = 1500, 600  # of the data set's training split; tested on its test split
    contrast, noise = 0.3, 0.1  # of pixels from 0 to 1

    def __init__(self, data: Path, tower: Path):
        if not (data / "captions.json").is_file():
            raise Refusal("D-MISSING", "EasyVQA is not there", file=data / "captions.json", fix=INPUTS)
        self.tower = CLIPVisionModel.from_pretrained(tower, dtype=torch.float32).eval().requires_grad_(False)
        # A projector reads the penultimate layer: the last one is not used.
        self.tower.encoder.layers = self.tower.encoder.layers[:-1]
        records = json.loads((data / "captions.json").read_text(encoding="utf-8"))
        train = {record["image"]: record["conversations"][1]["value"] for record in records}
        names = random.Random(0).sample(sorted(train), self.train_examples + self.validation_examples)
        self.classes = sorted(set(train.values()))
        test = test_captions(data)
        self.x, self.y = self._read(data, names[: self.train_examples], train, seed=0)
        self.parts = {
            "validation": self._read(data, names[self.train_examples :], train, seed=1),
            "test": self._read(data, sorted(test), test, seed=2),
        }
        self.digest = digest_of(self.x, self.y, *(tensor for part in self.parts.values() for tensor in part))
        self.sizes = {"train": self.train_examples} | {part: len(y) for part, (_, y) in self.parts.items()}
        self.sizes["classes"] = len(self.classes)

    def _read(self, data: Path, names: list[str], captions: dict[str, str], seed: int) -> tuple[Tensor, Tensor]:
        """float32[N, 3, 64, 64] as the tower takes them, and the classes int64[N]."""
        pixels = np.stack([np.asarray(Image.open(data / "images" / name).convert("RGB")) for name in names])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        classes = torch.tensor([self.classes.index(captions[name]) for name in names])
        return (strange(images, self.contrast, self.noise, seed) - 0.5) / 0.5, classes

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.tower)

    def head(self) -> nn.Module:
        return nn.Linear(self.tower.config.hidden_size, len(self.classes))

    def logits(self, model: nn.Module, head: nn.Module, images: Tensor) -> Tensor:
        """(B, 24)"""
        return head(model(images).last_hidden_state[:, 1:].mean(1))

    def loss(self, model: nn.Module, head: nn.Module, examples: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(model, head, self.x[examples]), self.y[examples])

    def measure(self, model: nn.Module, head: nn.Module, part: str) -> tuple[float, float]:
        images, classes = self.parts[part]
        logits = torch.cat([self.logits(model, head, some) for some in images.split(256)])
        accuracy = (logits.argmax(-1) == classes).double().mean()
        return F.cross_entropy(logits.double(), classes).item(), accuracy.item()


def strange(images: Tensor, contrast: float, noise: float, seed: int) -> Tensor:
    """Inverted, paler and noisy: images (N, 3, H, W) and result in 0 … 1, apart from the noise (its σ)."""
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return 0.5 + contrast * (0.5 - images) + noise * drawn


def test_captions(data: Path) -> dict[str, str]:
    """Image → "a red circle", for the test images whose questions settle it."""
    rows = json.loads((data / "test.json").read_text(encoding="utf-8"))
    found = {}
    for image, turns in by_image([[row["question"], row["answer"], row["image"]] for row in rows]).items():
        known = Knowledge()
        for question, answer in turns:
            known.learn(question, answer)
        if (caption := known.caption()) is not None:
            found[image] = caption
    return found


class Text:
    """First lines of docstrings → module name. The adapters are in the top layers; what enters those is computed once.

    Raises:
        Refusal: K-MISSING, the LLM is not there.
    """

    targets = r".*\.(q|k|v|o|gate|up|down)_proj"
    top_layers = 2
    fewest, most = 20, 32  # docstrings of a module
    validation_share, test_share = 0.15, 0.25  # of the docstrings; the others are trained on

    def __init__(self, llm: Path, cache: Path):
        if not (llm / "config.json").is_file():
            raise Refusal("K-MISSING", "the language model is not there", file=llm / "config.json", fix=INPUTS)
        self.tokenizer = AutoTokenizer.from_pretrained(llm)
        whole = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval().requires_grad_(False)
        items = docstrings(self.fewest, self.most)
        random.Random(0).shuffle(items)
        self.prompt_and_answer = encoded = [self.encode(line, module) for line, module in items]
        self.prompts = torch.tensor([len(prompt) for prompt, _ in encoded])
        self.answers = [torch.tensor(answer) for _, answer in encoded]
        self.lengths = self.prompts + torch.tensor([len(answer) for answer in self.answers]) - 1  # what the LLM reads
        ids = [torch.tensor((prompt + answer)[:-1]) for prompt, answer in encoded]
        weights = digest_of(*ids, whole.get_input_embeddings().weight, whole.model.layers[-1].mlp.down_proj.weight)
        file = cache / f"hidden-{self.top_layers}-{weights}.safetensors"
        self.hidden = cached(file, lambda: lower_hidden(whole, ids, self.top_layers))
        test, validation = (round(len(items) * share) for share in (self.test_share, self.validation_share))
        self.train_examples = len(items) - test - validation
        numbers = torch.arange(self.train_examples, len(items))
        self.parts = {"validation": numbers[:validation], "test": numbers[validation:]}
        self.digest = digest_of(self.hidden, self.prompts, *self.answers)
        self.sizes = {"train": self.train_examples} | {part: len(n) for part, n in self.parts.items()}
        self.sizes["classes"] = len({module for _, module in items})
        self.unembed = whole.lm_head.weight  # (V, D)
        self.top = whole.model
        self.top.layers = self.top.layers[-self.top_layers :]
        self.top.embed_tokens = nn.Identity()
        self.top.config.num_hidden_layers = self.top_layers

    def encode(self, line: str, module: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt, at most 48, and of the answer with its end."""
        prompt = self.tokenizer(f"{line}\nModule:", add_special_tokens=False)["input_ids"][-48:]
        answer = self.tokenizer(f" {module}", add_special_tokens=False)["input_ids"]
        return prompt, [*answer, self.tokenizer.eos_token_id]

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.top)

    def head(self) -> None:
        return None

    def logits(self, model: nn.Module, examples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(S, V) at the places of the answers, the answers' ids (S), and which of ``examples`` each belongs to (S)."""
        # Causal and padded on the right: no real token sees a padded one, so no mask is needed.
        hidden = model(inputs_embeds=self.hidden[examples, : int(self.lengths[examples].max())], use_cache=False)[0]
        answers = [self.answers[number] for number in examples.tolist()]
        rows = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor([len(a) for a in answers]))
        places = torch.cat([
            torch.arange(len(answer)) + int(self.prompts[number]) - 1
            for number, answer in zip(examples.tolist(), answers, strict=True)
        ])  # fmt: skip
        return F.linear(hidden[rows, places], self.unembed), torch.cat(answers), rows

    def loss(self, model: nn.Module, head: None, examples: Tensor) -> Tensor:
        logits, answers, _ = self.logits(model, examples)
        return F.cross_entropy(logits, answers)

    def measure(self, model: nn.Module, head: None, part: str) -> tuple[float, float]:
        numbers = self.parts[part]
        numbers = numbers[self.lengths[numbers].argsort(stable=True)]  # little padding
        losses, right = [], []
        for examples in numbers.split(32):
            logits, answers, rows = self.logits(model, examples)
            losses.append(F.cross_entropy(logits, answers, reduction="none").double())
            wrong = torch.zeros(len(examples)).index_add(0, rows, (logits.argmax(-1) != answers).float())
            right.append((wrong == 0).double())
        return torch.cat(losses).mean().item(), torch.cat(right).mean().item()


def lower_hidden(model: nn.Module, ids: list[Tensor], top_layers: int) -> Tensor:
    """float32[N, T, D]: what enters the layer ``top_layers`` from the top, padded on the right with zeros."""
    hidden = torch.zeros(len(ids), max(len(i) for i in ids), model.config.hidden_size)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            numbers = order[start : start + 32]
            batch = nn.utils.rnn.pad_sequence([ids[number] for number in numbers], batch_first=True)
            states = model.model(input_ids=batch, use_cache=False, output_hidden_states=True).hidden_states
            for row, number in enumerate(numbers):
                hidden[number, : len(ids[number])] = states[-1 - top_layers][row, : len(ids[number])]
    return hidden


def cached(file: Path, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor in ``file``, which is written whole or not at all; computed where it is missing."""
    if not file.is_file():
        part = file.with_suffix(".part")
        save_file({"hidden": compute()}, part)
        part.replace(file)
    with safe_open(file, "pt") as stored:
        return stored.get_tensor("hidden")


def digest_of(*tensors: Tensor) -> str:
    """Of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy())
    return found.hexdigest()[:16]


def docstrings(fewest: int, most: int) -> list[tuple[str, str]]:
    """(first line, module) from the source text of the standard library, at most ``most`` of each module.

    Public functions, classes and methods of the modules at the top level that have at least ``fewest`` such lines. A
    line that occurs in two modules is left out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    lines: dict[str, set[str]] = defaultdict(set)
    for file in sorted([*library.glob("*.py"), *library.glob("*/**/*.py")]):
        parts = file.relative_to(library).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names - LEFT_OUT and parts[0][0] != "_" and not {"test", "tests"} & set(parts):
            lines[parts[0]] |= first_lines(file)
    owners: dict[str, int] = defaultdict(int)
    for found in lines.values():
        for line in found:
            owners[line] += 1
    items = []
    for module, found in sorted(lines.items()):
        own = sorted(line for line in found if owners[line] == 1)
        if len(own) >= fewest:
            items += [(line, module) for line in random.Random(module).sample(own, min(most, len(own)))]
    return items


def first_lines(file: Path) -> set[str]:
    """First lines, of 4 words or more, of the docstrings of what is public in a file of Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own escapes
        tree = ast.parse(file.read_text(encoding="utf-8-sig"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if len(line.split()) >= 4:
                found.add(line)
    return found
