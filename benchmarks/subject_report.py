"""The measures of benchmarks/subject.py, read from pixels and by the project's tower, and what differences say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from subject_base import Drawings, background_of, far_from
from transformers import AutoImageProcessor, CLIPVisionModel

from llava_moslora.studies.statistics import Difference, corrected, difference

SUBJECT_COLOUR = "magenta"
COLOURS = {
    "black": (0, 0, 0), "blue": (0, 0, 255), "brown": (165, 42, 42), "gray": (128, 128, 128), "green": (0, 255, 0),
    "red": (255, 0, 0), "teal": (0, 128, 128), "yellow": (255, 255, 0), SUBJECT_COLOUR: (255, 0, 255),
}  # fmt: skip
MEASURES = ("likeness", "colour", "shape", "kept")


class PixelReader:
    """Colour and shape of a drawing's figure. The shape is that whose mean share of its bounding box, over EasyVQA's
    drawings, is nearest: a rectangle fills its box, a triangle half of it."""

    def __init__(self, drawings: Drawings):
        filled: dict[str, list[float]] = {}
        for pixels, caption in zip(drawings.pixels, drawings.captions, strict=True):
            if (mask := figure(pixels)) is not None:
                filled.setdefault(caption.split()[-1], []).append(share_of_box(mask))
        self.shares = {shape: float(np.mean(values)) for shape, values in filled.items()}

    def read(self, pixels: np.ndarray) -> tuple[str | None, str | None]:
        """Colour and shape of uint8[S, S, 3]; (None, None) where there is no figure."""
        mask = figure(pixels)
        if mask is None:
            return None, None
        colour = np.median(pixels[mask], axis=0)
        share = share_of_box(mask)
        return (
            min(COLOURS, key=lambda name: float(np.linalg.norm(colour - COLOURS[name]))),
            min(self.shares, key=lambda shape: abs(share - self.shares[shape])),
        )

    def right(self, drawings: Drawings) -> dict[str, float]:
        """How often EasyVQA's own drawings are read as their captions, in percent."""
        rows = [self.read(pixels) for pixels in drawings.pixels]
        truth = [caption.split()[1:] for caption in drawings.captions]
        return {
            name: 100 * float(np.mean([row[n] == said[n] for row, said in zip(rows, truth, strict=True)]))
            for n, name in enumerate(("colour", "shape"))
        }


def figure(pixels: np.ndarray) -> np.ndarray | None:
    """Where the figure is, bool[S, S]; None with fewer than 8 pixels of one."""
    mask = far_from(pixels, background_of(pixels))
    return mask if mask.sum() >= 8 else None


def share_of_box(mask: np.ndarray) -> float:
    return float(mask.sum() / (mask.any(axis=0).sum() * mask.any(axis=1).sum()))


def measure(
    images: Sequence[Image.Image], prompts: Sequence[str], pictures: Path, reader: PixelReader, tower: Path
) -> dict[str, float]:
    """The four measures and their mean, as the protocol has them."""
    read = [reader.read(np.asarray(image.convert("RGB"))) for image in images]
    rows = list(zip(prompts, read, strict=True))
    own = [(prompt.split()[-1], found) for prompt, found in rows if "ikat" in prompt]
    others = [(tuple(prompt.split()[1:]), found) for prompt, found in rows if "ikat" not in prompt]
    circles = [image for image, prompt in zip(images, prompts, strict=True) if prompt == "a ikat circle"]
    photos = [Image.open(file) for file in sorted(pictures.glob("*.png"))]
    seen, real = embedded(circles, tower), embedded(photos, tower)
    found = {
        "likeness": 100 * float((seen @ real.T).mean()),
        "colour": 100 * float(np.mean([found[0] == SUBJECT_COLOUR for _, found in own])),
        "shape": 100 * float(np.mean([found[1] == shape for shape, found in own])),
        "kept": 100 * float(np.mean([found == said for said, found in others])),
    }
    return found | {"mean": float(np.mean(list(found.values())))}


@torch.inference_mode()
def embedded(images: Sequence[Image.Image], tower: Path) -> torch.Tensor:
    """Unit vectors, float32[N, E]: the tower's normalised class token."""
    model = CLIPVisionModel.from_pretrained(tower, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoImageProcessor.from_pretrained(tower, local_files_only=True, backend="pil")
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
    return torch.nn.functional.normalize(model(**pixels).pooler_output, dim=-1)


def report(found: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
    """Of arm → seed → measures: the values, and MoSLoRA minus LoRA with a verdict for each measure."""
    values = {arm: {m: {s: one[m] for s, one in of.items()} for m in MEASURES} for arm, of in found.items()}
    differences = corrected([difference(values["moslora"][m], values["lora"][m]) for m in MEASURES])
    rows = {}
    for name, one in zip(MEASURES, differences, strict=True):
        assert one is not None, "several seeds"
        rows[name] = {
            "lora": float(np.mean(list(values["lora"][name].values()))),
            "moslora": float(np.mean(list(values["moslora"][name].values()))),
            "difference": one.mean, "interval": [one.low, one.high], "p_holm": one.adjusted, "verdict": verdict(one),
        }  # fmt: skip
    return {"by_seed": values, "measures": rows}


def verdict(one: Difference) -> str:
    if one.significant:
        return f"MoSLoRA is {'better' if one.mean > 0 else 'worse'} than LoRA"
    return f"no difference above {one.largest:.1f} was seen"


def table(content: dict[str, Any]) -> str:
    lines = [f"{'':10}{'untuned':>9}{'LoRA':>9}{'MoSLoRA':>9}{'minus LoRA':>12}{'95 %':>18}{'p (Holm)':>10}"]
    for name, row in content["measures"].items():
        low, high = row["interval"]
        lines.append(
            f"{name:10}{content['untuned'][name]:>9.1f}{row['lora']:>9.1f}{row['moslora']:>9.1f}"
            f"{row['difference']:>+12.1f}{f'{low:+.1f} to {high:+.1f}':>18}{row['p_holm']:>10.3f}  {row['verdict']}"
        )
    read = content["pixels_read_right"]
    lines.append(f"read right on EasyVQA's drawings: colour {read['colour']:.1f} %, shape {read['shape']:.1f} %")
    lines.append(f"{content['cpu_seconds']} CPU seconds, {content['wall_seconds'] / 60:.1f} minutes")
    return "\n".join(lines)
