"""Images of subjects from a tuned SDXL, in a folder for comparing two methods.

    FOLDER/images.json            the model, and the subject, prompt and seed of every image
    FOLDER/cat/03-1.png           prompt 3, seed 1

The initial latent of an image depends only on (subject, prompt, seed), so that two methods are compared on the
same noise. The reference sets no seed: its two methods' images have unrelated noise.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from llava_moslora.data.images import load_image
from llava_moslora.errors import Refusal, few
from llava_moslora.evaluation.subjects import Subject
from llava_moslora.files.disk import read_json, replace_json
from llava_moslora.files.manifest import sha256
from llava_moslora.models.names import SDXL_PARTS
from llava_moslora.noise import collected_reports
from llava_moslora.runs.fingerprint import fingerprint

IMAGES = "images.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
DOWN = ("lora_A", "lora.down.", "lora_down")  # one per layer, in the key formats that diffusers reads


@dataclass(frozen=True)
class Drawn:
    """One image: ``subject``, the number and text of its ``prompt``, without the identifier, and ``seed``."""

    subject: str
    number: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.number:02d}-{self.seed}.png"

    def generator(self) -> torch.Generator:
        """Of the initial latent, on the CPU: the same on any device."""
        digest = hashlib.sha256(f"{self.subject}/{self.number}/{self.seed}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def planned(subjects: Sequence[Subject], seeds: Sequence[int]) -> list[Drawn]:
    """Every subject × prompt × seed, in this order."""
    return [
        Drawn(subject.name, number, prompt, seed)
        for subject in subjects
        for number, prompt in enumerate(subject.prompts(""))
        for seed in seeds
    ]


def load_pipeline(base: str | Path, dtype: str) -> Any:
    """diffusers' SDXL pipeline of a local folder, on the GPU where there is one; without its invisible watermark, which
    is drawn only where another package is installed.

    Raises:
        Refusal: E-MISSING, diffusers is not installed; K-MISSING, K-JSON, no folder of an SDXL pipeline.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise Refusal(
            "E-MISSING", "needs diffusers, which is not installed", fix="pip install 'llava_moslora[diffusion]'"
        )
    index, fix = Path(base) / "model_index.json", "give the folder of a Stable Diffusion XL in diffusers' layout"
    if not index.is_file():
        raise Refusal("K-MISSING", "no such file", file=index, key="--base", fix=fix)
    if (kind := read_json(index).get("_class_name")) != "StableDiffusionXLPipeline":
        raise Refusal("K-JSON", "not an SDXL pipeline", file=index, key="_class_name", found=kind, fix=fix)
    from diffusers import StableDiffusionXLPipeline
    from safetensors import SafetensorError

    fix = "download it again"
    try:
        with collected_reports() as reports:
            pipeline = StableDiffusionXLPipeline.from_pretrained(
                str(base), dtype=getattr(torch, dtype), local_files_only=True, add_watermarker=False
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        what, found = "diffusers cannot load the pipeline", str(error)[:200]
        raise Refusal("K-MISSING", what, file=base, key="--base", found=found, fix=fix) from error
    if lacking := _missing(pipeline, reports):
        raise Refusal(
            "K-KEYS", "tensors of the model are missing", file=base, key="--base", found=few(lacking), fix=fix
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _missing(pipeline: Any, reports: Sequence[str]) -> list[str]:
    """Tensors that no file has: diffusers leaves its own empty, transformers draws its own at random."""
    empty = [
        f"{part}.{name}"
        for part in (*SDXL_PARTS, "vae")
        for name, parameter in getattr(pipeline, part).named_parameters()
        if parameter.is_meta
    ]
    # Older encoders' files have their positions, which are no weights, and newer ones lack them
    plain = [re.sub(r"\x1b\[[\d;]*m", "", text) for text in reports]  # coloured on a terminal
    # one line may stand for a tensor of several layers: "layers.{0, 1}.weight"
    reported = [name for text in plain for name in re.findall(r"^(\S.*?) +\| +MISSING", text, re.MULTILINE)]
    return empty + [name for name in reported if "position_ids" not in name]


def lora_file(lora: str | Path) -> Path:
    """The file of a folded LoRA; ``path`` may be its folder.

    Raises:
        Refusal: K-MISSING, no such file; K-ADAPTER, no safetensors, or with mixers.
    """
    file = Path(lora) / LORA_FILE if Path(lora).is_dir() else Path(lora)
    if not file.is_file():
        raise Refusal("K-MISSING", "no such file", file=file, key="--lora", fix=f"give the folder with {LORA_FILE}")
    if mixers := [key for key in _tensor_names(file) if "lora_mixer" in key or "downB" in key]:
        # diffusers drops them with only a log line, and the images are wrong
        fix = "give the folder that scripts/export.py made of the run"
        raise Refusal("K-ADAPTER", "contains mixers, which diffusers ignores", file=file, found=mixers[0], fix=fix)
    return file


def _tensor_names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stream:
            return list(stream.keys())
    except (OSError, SafetensorError) as error:
        fix = f"give the folder with {LORA_FILE}"
        raise Refusal("K-ADAPTER", "not a safetensors file", file=file, key="--lora", found=error, fix=fix) from error


def load_lora(pipeline: Any, lora: str | Path) -> Path:
    """Load a folded LoRA by diffusers' own reader; its file.

    Raises:
        Refusal: as :func:`lora_file`; K-ADAPTER, diffusers does not load it completely.
    """
    from safetensors import SafetensorError

    file = lora_file(lora)
    try:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Refusal("K-ADAPTER", "diffusers cannot load it", file=file, found=str(error)[:200]) from error
    stored, loaded = sum(any(word in key for word in DOWN) for key in _tensor_names(file)), _adapted_layers(pipeline)
    if loaded < stored or not stored:  # also one line in diffusers' log
        raise Refusal(
            "K-ADAPTER", "not a LoRA of this model: diffusers ignores layers of the file", file=file,
            found=f"{stored} layers, of which {loaded} were loaded", fix="give a LoRA that was trained on --base",
        )  # fmt: skip
    return file


def _adapted_layers(pipeline: Any) -> int:
    parts = [getattr(pipeline, part) for part in SDXL_PARTS]
    return sum(1 for part in parts for module in part.modules() if len(getattr(module, "lora_A", ())))


def draw(
    pipeline: Any, subjects: Sequence[Subject], output: Path, *, identifiers: Mapping[str, str],
    loras: Mapping[str, Path], seeds: Sequence[int], base: str | Path, steps: int, guidance: float, size: int | None,
) -> None:  # fmt: skip
    """Generate every planned image that ``output`` lacks; the same call continues a killed one.

    Args:
        identifiers: subject → the word it was tuned with.
        loras: subject → its LoRA (:func:`load_lora`); a subject without one is drawn by the base.
        size: pixels of a side; None: as large as the base was trained for.

    Raises:
        Refusal: C-ANSWERS, ``output`` holds images of other settings; K-ADAPTER, K-MISSING.
    """
    settings = {
        "base": hashlib.sha256(repr(sorted(fingerprint(base).items())).encode()).hexdigest(),
        "steps": steps, "guidance": guidance, "size": size, "dtype": str(pipeline.unet.dtype),
        "scheduler": type(pipeline.scheduler).__name__,
    }  # fmt: skip
    drawn_by = {name: sha256(lora_file(lora)) for name, lora in loras.items()}
    content: dict[str, Any] = {"settings": settings, "loras": drawn_by, "identifiers": dict(identifiers), "images": {}}
    if (output / IMAGES).is_file():
        stored = read_json(output / IMAGES)
        for key in ("settings", "loras", "identifiers"):
            if stored.get(key) != content[key]:
                raise Refusal(
                    "C-ANSWERS", "contains images of another model or other settings", file=output / IMAGES, key=key,
                    found=str(stored.get(key))[:200], expected=str(content[key])[:200], fix="choose another --output",
                )  # fmt: skip
        content["images"] = stored.get("images", {})
    wanted = planned(subjects, seeds)
    bar = tqdm(total=len(wanted), desc="images", unit="image")
    for subject in subjects:
        own = [image for image in wanted if image.subject == subject.name]
        missing = [image for image in own if not (output / image.name).is_file() or image.name not in content["images"]]
        bar.update(len(own) - len(missing))
        if not missing:
            continue
        if subject.name in loras:
            load_lora(pipeline, loras[subject.name])
        (output / subject.name).mkdir(parents=True, exist_ok=True)
        prompts = subject.prompts(identifiers[subject.name])
        for image in missing:
            picture = pipeline(
                prompts[image.number], num_inference_steps=steps, guidance_scale=guidance, height=size, width=size,
                generator=image.generator(),
            ).images[0]  # fmt: skip
            unfinished = output / subject.name / f".{image.number:02d}-{image.seed}.unfinished"
            picture.save(unfinished, "PNG")
            unfinished.replace(output / image.name)
            content["images"][image.name] = asdict(image)
            replace_json(output / IMAGES, content)
            bar.update()
        if subject.name in loras:
            pipeline.unload_lora_weights()
    bar.close()


@dataclass(frozen=True)
class DrawnFolder:
    """The images of one method, as :func:`draw` wrote them."""

    folder: Path
    settings: dict[str, Any]
    images: tuple[Drawn, ...]

    def open(self, image: Drawn) -> Image.Image:
        """
        Raises:
            Refusal: I-MISSING and the others of :func:`llava_moslora.data.images.load_image`.
        """
        return load_image(image.name, self.folder)


def read_drawn(folder: str | Path) -> DrawnFolder:
    """
    Raises:
        Refusal: K-MISSING, no ``images.json``; K-JSON, not as :func:`draw` writes it.
    """
    file, fix = Path(folder) / IMAGES, "give a folder that evaluate_subjects.py draw wrote"
    if not file.is_file():
        raise Refusal("K-MISSING", "no drawn images", file=file, fix=fix)
    content = read_json(file)
    try:
        images = tuple(Drawn(**entry) for entry in content["images"].values())
        if [image.name for image in images] != list(content["images"]) or not images:
            raise ValueError("no images, or names that are not theirs")
        return DrawnFolder(Path(folder), dict(content["settings"]), images)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what, found = "not a list of drawn images", repr(error)[:200]
        raise Refusal("K-JSON", what, file=file, found=found, fix=fix) from error


def paired_images(a: DrawnFolder, b: DrawnFolder) -> list[Drawn]:
    """The images of both, which must be of the same prompts, seeds and settings.

    Raises:
        Refusal: C-COMPARE.
    """
    for key in a.settings.keys() | b.settings.keys():
        if a.settings.get(key) != b.settings.get(key):
            raise Refusal(
                "C-COMPARE", "drawn with other settings", file=b.folder, key=key, found=str(b.settings.get(key)),
                expected=str(a.settings.get(key)), fix="draw both with the same base, steps and guidance",
            )  # fmt: skip
    if other := set(a.images) ^ set(b.images):
        raise Refusal(
            "C-COMPARE", "not the same images", file=b.folder, found=f"{len(other)} that only one folder has",
            fix="draw both with the same --subjects, --names and --seeds",
        )  # fmt: skip
    return list(a.images)
