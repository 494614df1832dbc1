"""Open an export with stock libraries only and answer its probe questions. A copy lies in every export::

    python EXPORT/probe/probe.py                # prints the answers
    python EXPORT/probe/probe.py --output FILE  # and writes logits, ids and answers to a safetensors file

It reads ``questions.json`` and the images beside it. Torch, transformers, peft, safetensors and pillow are all it
needs; it must never import the package that wrote the export, which would then prove nothing.

Shapes: T tokens, P patches, E vision width, D LLM width, V vocabulary.
"""

import argparse
import functools
import json
import sys
import warnings
from pathlib import Path

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

# Of a configuration's model_type: the class, and how many tokens it puts before the patches.
TOWERS = {"clip": (CLIPVisionModel, 1), "siglip": (SiglipVisionModel, 0)}
BLOCK = 2**24  # numbers of a mapped weight that are in float32 at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    above = Path(__file__).resolve().parents[1]
    parser.add_argument("--folder", type=Path, default=above, help="the export, if not the folder above")
    parser.add_argument("--output", help="write what was found to this safetensors file")
    args = parser.parse_args()
    found = find(args.folder)
    assert "llava_moslora" not in sys.modules, "stock libraries only"
    print({name: tensor.tolist() for name, tensor in found.items() if name.startswith("answer.")})
    if args.output:
        save_file(found, args.output)


def find(folder: Path) -> dict:
    """For every question of the export, by ``what.number``: the ids, the last logits, the answer, the features."""
    probe = folder / "probe"
    asked = json.loads((probe / "questions.json").read_text(encoding="utf-8"))
    opened = (Whole if "llava" in asked["reopen"] else Parts)(folder, asked)
    found = {}
    with torch.inference_mode():
        for number, question in enumerate(asked["questions"]):
            images = [Image.open(probe / name).convert("RGB") for name in question["images"]]
            answer = opened.answer(question, images)
            found |= {f"{key}.{number}": tensor.contiguous() for key, tensor in answer.items()}
    return found


class Whole:
    """A ``LlavaForConditionalGeneration`` with its processor, and an adapter over it where there is one."""

    def __init__(self, root: Path, asked: dict):
        self.asked = asked
        folder = root / asked["reopen"]["llava"]
        # Pillow scales images as training did; torchvision, which transformers 5 prefers, does not quite.
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        if asked["mapped"]:
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
            for part in (self.model.model.vision_tower, self.model.model.multi_modal_projector):
                part.float()
            for part in (self.model.model.language_model, self.model.lm_head):
                compute_in_float32(part)
        else:
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        if "adapter" in asked["reopen"]:
            self.model = with_adapter(self.model, root / asked["reopen"]["adapter"])

    def answer(self, question: dict, images: list) -> dict:
        prompt = self.processor.apply_chat_template(messages(question), add_generation_prompt=True)
        inputs = self.processor(images=images or None, text=prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        logits = self.model(**inputs).logits[0, -1].float()
        # What to stop at is the export's own generation config: that it stops is a part of the proof.
        output = self.model.generate(**inputs, max_new_tokens=self.asked["max_new_tokens"], do_sample=False)
        return {
            "ids": inputs["input_ids"][0],
            "logits": logits,
            "answer": output[0, length:],
        }


class Parts:
    """LLM, vision tower and projector by themselves, composed by hand; whichever of them there are."""

    def __init__(self, root: Path, asked: dict):
        self.asked, spec = asked, asked["reopen"]
        self.llm = self.tower = self.projector = self.tokenizer = self.noise = None
        self.dtype = "auto" if asked["mapped"] else torch.float32
        if "original_llava" in spec:
            self._open_original(root / spec["original_llava"], spec["vision"])
        if "llm" in spec:
            self.llm = AutoModelForCausalLM.from_pretrained(root / spec["llm"], dtype=self.dtype).eval()
            if spec["llm"] == ".":
                self.tokenizer = AutoTokenizer.from_pretrained(root)
        if self.llm is not None and asked["mapped"]:
            compute_in_float32(self.llm)
        if "vision" in spec and self.tower is None:
            self._open_tower(root / spec["vision"])
        if "llm_adapter" in spec:
            self.llm = with_adapter(self.llm, root / spec["llm_adapter"])
        if "vision_adapter" in spec:
            self.tower = with_adapter(self.tower, root / spec["vision_adapter"])
        if "projector" in spec:
            self.projector = load_file(root / spec["projector"] / "model.safetensors")
            if self.tower is None:
                self.noise = load_file(root / "probe" / "features.safetensors")["features"]

    def _open_tower(self, folder: Path) -> None:
        kind = json.loads((folder / "config.json").read_text())["model_type"].removesuffix("_vision_model")
        tower_class, self.class_tokens = TOWERS[kind]
        self.tower = tower_class.from_pretrained(folder, dtype=torch.float32).eval()
        self.pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def _open_original(self, root: Path, tower: str) -> None:
        """The original LLaVA's folder, taken apart by the names that its own classes have."""
        state = {}
        for file in sorted(root.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                state |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        self._open_tower(Path(tower))
        level = "vision_model." if any(n.startswith("vision_model.") for n in self.tower.state_dict()) else ""
        theirs = "model.vision_tower.vision_tower.vision_model."
        self.tower.load_state_dict(
            {level + n.removeprefix(theirs): t for n, t in state.items() if n.startswith(theirs)}
        )
        theirs = "model.mm_projector."
        projector = {n: t.float() for n, t in state.items() if n.startswith(theirs)}
        self.projector = {f"model.{n.removeprefix(theirs)}": t for n, t in projector.items()}
        own = {n: t for n, t in state.items() if not n.startswith(("model.vision_tower.", "model.mm_projector."))}
        config = LlamaConfig.from_dict(json.loads((root / "config.json").read_text()))
        self.llm = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=own, dtype=self.dtype).eval()

    def answer(self, question: dict, images: list) -> dict:
        found = {}
        if images and self.tower is not None:
            found["features"] = self.features(images)  # (N, P, E)
        if self.projector is not None:
            features = found.get("features", self.noise)
            if features is not None:
                found["projected"] = self.project(features)  # (N, P, D)
        if self.llm is None or (images and "projected" not in found):
            return found
        if self.tokenizer is not None:
            prompt = self.tokenizer.apply_chat_template(messages(question), add_generation_prompt=True, tokenize=False)
            found["ids"] = torch.tensor(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([question["ids"]])
        seen = ids == self.asked["image_token_id"]
        # The placeholder may be a row that the original LLM does not have; it is replaced anyway.
        embeddings = self.llm.get_input_embeddings()(ids.masked_fill(seen, 0)).clone()  # (1, T, D)
        if images:
            embeddings[seen] = found["projected"].flatten(0, 1)
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
            images = [square(image, self.pixels.image_mean) for image in images]
        pixels = self.pixels(images=images, return_tensors="pt")["pixel_values"]
        return self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, self.class_tokens :]

    def project(self, features: torch.Tensor) -> torch.Tensor:
        linear, w = torch.nn.functional.linear, self.projector
        hidden = torch.nn.functional.gelu(linear(features, w["model.0.weight"], w["model.0.bias"]))
        return linear(hidden, w["model.2.weight"], w["model.2.bias"])


def compute_in_float32(model: nn.Module) -> None:
    """Linears and embeddings keep their 16-bit weights, mapped from the files, and compute with them in float32.

    What a model in float32 computes, in a fraction of its memory: pages of a mapped file are read again when they are
    wanted, however little memory there is.
    """
    for part in model.modules():
        if type(part) is nn.Linear:
            part.forward = functools.partial(linear, part)
        elif type(part) is nn.Embedding:
            part.forward = functools.partial(embedding, part)
        else:
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.float()


def linear(part: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return by_rows(x, part.weight.shape, part.bias, lambda begin, end: part.weight[begin:end].float())


def by_rows(x: torch.Tensor, shape: tuple, bias: torch.Tensor | None, rows) -> torch.Tensor:
    """float32[…, out] of float32[…, in] by a weight of ``shape`` (out, in), a block of its rows at a time.

    ``rows(begin, end)`` gives the block in float32.
    """
    step = max(1, BLOCK // shape[1])
    result = torch.cat([F.linear(x, rows(k, k + step)) for k in range(0, shape[0], step)], dim=-1)
    return result if bias is None else result + bias.float()


def embedding(part: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, part.weight).float()


def with_adapter(model, folder: Path):
    """A tensor that finds no place would only be warned about, and the answers be those of another model."""
    from peft import PeftModel

    warnings.filterwarnings("error", message=".*missing adapter keys.*")
    bare = not any(name.startswith("vision_model.") for name, _ in model.named_modules())
    mapping = {"^vision_model\\.": ""} if bare else None  # the level that transformers 5.6 took away
    return PeftModel.from_pretrained(model, folder, key_mapping=mapping).eval()


def square(image: Image.Image, mean: list) -> Image.Image:
    """The image centred on a square of the mean colour, as LLaVA-1.5 is trained."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def messages(question: dict) -> list:
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
