"""Load an export with stock libraries only and answer its questions. A copy of this file is in every export::

    python EXPORT/probe/probe.py                # prints the answers
    python EXPORT/probe/probe.py --output FILE  # and writes logits, ids and answers to a safetensors file

It reads ``questions.json`` and the images next to it, and needs torch, transformers, peft, safetensors and pillow. It
must never import the package that wrote the export: the comparison would then be meaningless.

Shapes: T tokens, P patches, E vision width, D LLM width, V vocabulary.
"""

import argparse
import functools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionModel,
)

# model_type of a vision tower -> its class, and the number of tokens before the patches
TOWERS = {"clip": (CLIPVisionModel, 1), "siglip": (SiglipVisionModel, 0)}
BLOCK = 2**24  # elements of a mapped weight that are in float32 at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    above = Path(__file__).resolve().parents[1]
    parser.add_argument("--folder", type=Path, default=above, help="the export, if not the folder above")
    parser.add_argument("--output", help="write logits, ids and answers to this safetensors file")
    args = parser.parse_args()
    found = answer_questions(args.folder)
    assert "llava_moslora" not in sys.modules, "stock libraries only"
    print({name: tensor.tolist() for name, tensor in found.items() if name.startswith("answer.")})
    if args.output:
        save_file(found, args.output)


def answer_questions(folder: Path) -> dict:
    """For every question of the export, as ``what.number``: ids, last logits, answer, features, projected features."""
    probe = folder / "probe"
    asked = json.loads((probe / "questions.json").read_text(encoding="utf-8"))
    model = (WholeModel if "llava" in asked["load_from"] else SeparateParts)(folder, asked)
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for number, question in enumerate(asked["questions"]):
            images = [Image.open(probe / name).convert("RGB") for name in question["images"]]
            answer = model.answer(question, images)
            found |= {f"{key}.{number}": tensor.contiguous() for key, tensor in answer.items()}
    return found


class WholeModel:
    """A ``LlavaForConditionalGeneration`` with its processor, and the adapter over it if there is one.

    ``asked`` is ``questions.json``; its ``load_from`` names the folder of each part.
    """

    def __init__(self, root: Path, asked: dict):
        self.asked = asked
        folder = root / asked["load_from"]["llava"]
        # Pillow scales images as in training; torchvision, which transformers 5 prefers, differs slightly.
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        if asked["mapped"]:
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
            for part in (self.model.model.vision_tower, self.model.model.multi_modal_projector):
                part.float()
            for part in (self.model.model.language_model, self.model.lm_head):
                compute_in_float32(part)
        else:
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        if "adapter" in asked["load_from"]:
            self.model = with_adapter(self.model, root / asked["load_from"]["adapter"])

    def answer(self, question: dict, images: list) -> dict:
        prompt = self.processor.apply_chat_template(messages(question), add_generation_prompt=True)
        inputs = self.processor(images=images or None, text=prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        logits = self.model(**inputs).logits[0, -1].float()
        # Generation stops by the export's own generation config: that is part of the verification.
        output = self.model.generate(**inputs, max_new_tokens=self.asked["max_new_tokens"], do_sample=False)
        return {
            "ids": inputs["input_ids"][0],
            "logits": logits,
            "answer": output[0, length:],
        }


class SeparateParts:
    """LLM, vision tower and projector, as far as they exist, loaded separately and combined here."""

    def __init__(self, root: Path, asked: dict):
        self.asked, folders = asked, asked["load_from"]
        self.llm: Any = None
        self.tower: Any = None
        self.tokenizer: Any = None
        self.projector: dict[str, torch.Tensor] = {}
        self.given_features: torch.Tensor | None = None
        self.dtype = "auto" if asked["mapped"] else torch.float32
        if "original_llava" in folders:
            self._load_original(root / folders["original_llava"], folders["vision"])
        if "llm" in folders:
            self.llm = AutoModelForCausalLM.from_pretrained(root / folders["llm"], dtype=self.dtype).eval()
            if folders["llm"] == ".":
                self.tokenizer = AutoTokenizer.from_pretrained(root)
        if self.llm is not None and asked["mapped"]:
            compute_in_float32(self.llm)
        if "vision" in folders and self.tower is None:
            self._load_tower(root / folders["vision"])
        if "llm_adapter" in folders:
            self.llm = with_adapter(self.llm, root / folders["llm_adapter"])
        if "vision_adapter" in folders:
            self.tower = with_adapter(self.tower, root / folders["vision_adapter"])
        if "projector" in folders:
            self.projector = load_file(root / folders["projector"] / "model.safetensors")
            if self.tower is None:
                self.given_features = load_file(root / "probe" / "features.safetensors")["features"]

    def _load_tower(self, folder: Path) -> None:
        kind = json.loads((folder / "config.json").read_text())["model_type"].removesuffix("_vision_model")
        tower_class, self.class_tokens = TOWERS[kind]
        self.tower = tower_class.from_pretrained(folder, dtype=torch.float32).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def _load_original(self, root: Path, tower: str) -> None:
        """Load the parts from an original LLaVA's folder, by the names in its own classes."""
        state: dict[str, torch.Tensor] = {}
        for file in sorted(root.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                state |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        self._load_tower(Path(tower))
        level = "vision_model." if any(n.startswith("vision_model.") for n in self.tower.state_dict()) else ""
        prefix = "model.vision_tower.vision_tower.vision_model."
        self.tower.load_state_dict(
            {level + n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        )
        prefix = "model.mm_projector."
        projector = {n: t.float() for n, t in state.items() if n.startswith(prefix)}
        self.projector = {f"model.{n.removeprefix(prefix)}": t for n, t in projector.items()}
        llm = {n: t for n, t in state.items() if not n.startswith(("model.vision_tower.", "model.mm_projector."))}
        config = LlamaConfig.from_dict(json.loads((root / "config.json").read_text()))
        self.llm = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=llm, dtype=self.dtype).eval()

    def answer(self, question: dict, images: list) -> dict:
        found = {}
        if images and self.tower is not None:
            found["features"] = self.features(images)  # (N, P, E)
        if self.projector:
            features = found.get("features", self.given_features)
            if features is not None:
                found["projected"] = self.project(features)  # (N, P, D)
        if self.llm is None or (images and "projected" not in found):
            return found
        if self.tokenizer is not None:
            prompt = self.tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, tokenize=False)
            found["ids"] = torch.tensor(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([question["ids"]])
        placeholders = ids == self.asked["image_token_id"]
        # The original LLM may have no row for the placeholder; it is replaced anyway.
        embeddings = self.llm.get_input_embeddings()(ids.masked_fill(placeholders, 0)).clone()  # (1, T, D)
        if images:
            embeddings[placeholders] = found["projected"].flatten(0, 1)
        inputs = {"inputs_embeds": embeddings, "attention_mask": torch.ones_like(ids)}
        found["logits"] = self.llm(**inputs).logits[0, -1].float()
        found["answer"] = self.llm.generate(
            **inputs,
            max_new_tokens=self.asked["max_new_tokens"],
            do_sample=False,
            eos_token_id=self.asked["stop"],
            pad_token_id=self.asked["pad_token_id"],
        )[0]
        return found

    def features(self, images: list) -> torch.Tensor:
        if self.asked["pads"]:
            images = [square(image, self.image_processor.image_mean) for image in images]
        pixels = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, self.class_tokens :]

    def project(self, features: torch.Tensor) -> torch.Tensor:
        linear, w = torch.nn.functional.linear, self.projector
        hidden = torch.nn.functional.gelu(linear(features, w["model.0.weight"], w["model.0.bias"]))
        return linear(hidden, w["model.2.weight"], w["model.2.bias"])


def compute_in_float32(model: nn.Module) -> None:
    """Make a model with 16-bit weights compute in float32; weights of linear layers and embeddings stay memory-mapped.

    The results are those of a model in float32, in a fraction of its memory: the system pages mapped files in again
    when they are used, however little memory there is.
    """
    for part in model.modules():
        if type(part) is nn.Linear:
            part.forward = functools.partial(_linear, part)
        elif type(part) is nn.Embedding:
            part.forward = functools.partial(_embedding, part)
        else:
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.float()


def _linear(part: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear_by_rows(x, part.weight.shape, part.bias, lambda begin, end: part.weight[begin:end].float())


def linear_by_rows(x: torch.Tensor, shape: tuple, bias: torch.Tensor | None, rows) -> torch.Tensor:
    """float32[…, out] of float32[…, in] by a weight of ``shape`` (out, in), a block of its rows at a time.

    ``rows(begin, end)`` gives the block in float32.
    """
    step = max(1, BLOCK // shape[1])
    result = torch.cat([F.linear(x, rows(k, k + step)) for k in range(0, shape[0], step)], dim=-1)
    return result if bias is None else result + bias.float()


def _embedding(part: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, part.weight).float()


def with_adapter(model, folder: Path):
    """``model`` with the adapter in ``folder``; a tensor without a target is an error, while PEFT only warns."""
    from peft import PeftModel

    warnings.filterwarnings("error", message=".*missing adapter keys.*")
    has_level = any(name.startswith("vision_model.") for name, _ in model.named_modules())
    mapping = None if has_level else {"^vision_model\\.": ""}  # transformers 5.6 removed this level
    return PeftModel.from_pretrained(model, folder, key_mapping=mapping).eval()


def square(image: Image.Image, mean: list) -> Image.Image:
    """The image centred on a square of the mean colour, as in LLaVA-1.5's training."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def messages(question: dict) -> list:
    """A question as transformers' chat templates take it."""
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    result = []
    for turn in question["turns"]:
        text, content = turn["text"], []
        if text.startswith("<image>\n"):
            text = text.removeprefix("<image>\n")
            content.append({"type": "image"})
        result.append({"role": roles[turn["role"]], "content": [*content, {"type": "text", "text": text}]})
    return result


if __name__ == "__main__":
    main()
