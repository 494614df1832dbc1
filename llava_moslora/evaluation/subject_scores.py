"""Similarity of images to their subject (CLIP-I, DINO) and to their prompt (CLIP-T); comparison of two methods.

Ruiz et al. 2023 (DreamBooth), section 4.1: CLIP-I and DINO are the mean cosine between every drawn image and every
photo of the subject, of CLIP ViT-B/32's image embeddings and of the class token of DINO ViT-S/16; CLIP-T is the mean
cosine between an image and its prompt, without the identifier. All are given here times 100.

Two methods are compared on the same prompts, seeds and latents. Subjects differ much more than images of one, so the
interval of a difference is a bootstrap over subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from llava_moslora.errors import Refusal, few
from llava_moslora.evaluation.compare import bootstrap, holm, interval, sign_flip, with_spread
from llava_moslora.evaluation.scoring import Unit
from llava_moslora.evaluation.subject_images import Drawn, DrawnFolder
from llava_moslora.evaluation.subjects import Subject
from llava_moslora.files.disk import read_json
from llava_moslora.noise import collected_reports

METRICS = {"clip_i": "CLIP-I", "dino": "DINO", "clip_t": "CLIP-T"}
BATCH = 32
Encode = Callable[[Sequence[Any]], torch.Tensor]  # images or texts → unit vectors, float32[n, width]


@dataclass(frozen=True)
class Encoders:
    """Encoders from local model folders; those not given are None, and their scores are omitted."""

    clip_image: Encode | None = None
    clip_text: Encode | None = None
    dino: Encode | None = None


def load_encoders(clip: str | None, dino: str | None) -> Encoders:
    """
    Args:
        clip: folder of a CLIP model with its processor; the metric's is openai/clip-vit-base-patch32.
        dino: folder of a vision transformer with its processor; the metric's is facebook/dino-vits16.

    Raises:
        Refusal: K-MISSING, K-JSON, no such model; K-KEYS, without some of its weights; C-FLAG, neither is given.
    """
    if clip is None and dino is None:
        raise Refusal("C-FLAG", "missing: no encoder to score with", key="--clip, --dino", fix="name a model folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip_image = clip_text = dino_image = None
    if clip is not None:
        model, images, texts = _load(clip, "clip", device)
        clip_image = _encoder(
            lambda batch: model.get_image_features(**images(images=list(batch), return_tensors="pt").to(device))
        )
        clip_text = _encoder(
            lambda batch: model.get_text_features(
                **texts(list(batch), padding=True, truncation=True, return_tensors="pt").to(device)
            )
        )
    if dino is not None:
        vit, processor, _ = _load(dino, None, device)
        dino_image = _encoder(
            lambda batch: vit(**processor(images=list(batch), return_tensors="pt").to(device)).last_hidden_state[:, 0]
        )
    return Encoders(clip_image, clip_text, dino_image)


def _load(folder: str, kind: str | None, device: str) -> tuple[Any, Any, Any]:
    """Model, image processor and tokenizer; of a vision transformer no tokenizer."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    config = Path(folder) / "config.json"
    if not config.is_file():
        fix = "give the folder of a model of transformers"
        raise Refusal("K-MISSING", "no such file", file=config, key="--clip" if kind else "--dino", fix=fix)
    found = read_json(config).get("model_type")
    if (found == "clip") != (kind == "clip"):
        what, fix = ("not a CLIP model", "give CLIP") if kind else ("a CLIP model", "give it as --clip, and DINO here")
        raise Refusal("K-JSON", what, file=config, key="model_type", found=found, fix=fix)
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True) if kind else None
        # A ViT's pooler is not used, and DINO's files have none
        without = {"add_pooling_layer": False} if found == "vit" else {}
        with collected_reports():
            model, info = AutoModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **without
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        what, text, fix = "transformers cannot load it", str(error)[:200], "download it again"
        raise Refusal("K-MISSING", what, file=folder, found=text, fix=fix) from error
    if lacking := sorted(info["missing_keys"]):  # transformers would draw them at random
        what, fix = f"{len(lacking)} tensors are missing", "download it again"
        raise Refusal("K-KEYS", what, file=folder, key=few(lacking), fix=fix)
    return model.to(device).eval(), processor, tokenizer


def _encoder(forward: Callable[[Sequence[Any]], Any]) -> Encode:
    """``forward`` in batches, normalised; transformers gives features bare or as ``pooler_output``."""

    @torch.inference_mode()
    def encode(what: Sequence[Any]) -> torch.Tensor:
        rows = []
        for start in range(0, len(what), BATCH):
            out = forward(what[start : start + BATCH])
            rows.append((out if isinstance(out, torch.Tensor) else out.pooler_output).float().cpu())
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1)

    return encode


def score_folder(drawn: DrawnFolder, subjects: Sequence[Subject], encoders: Encoders) -> dict[Drawn, dict[str, float]]:
    """Image → metric → score, 100 × cosine.

    Raises:
        Refusal: C-COMPARE, images of a subject or a prompt that the data set has not; I-…, an image is damaged.
    """
    known = {subject.name: subject for subject in subjects}
    scores: dict[Drawn, dict[str, float]] = {}
    bar = tqdm(total=len(drawn.images), desc=str(drawn.folder), unit="image")
    for name in dict.fromkeys(image.subject for image in drawn.images):
        own = [image for image in drawn.images if image.subject == name]
        if name not in known or not {image.prompt for image in own} <= set(known[name].prompts("")):
            raise Refusal(
                "C-COMPARE", "images of a subject or a prompt that is not in --subjects", file=drawn.folder, key=name,
                fix="give the data set that they were generated for",
            )  # fmt: skip
        pictures, photos = [drawn.open(image) for image in own], known[name].images()
        columns: dict[str, torch.Tensor] = {}
        for metric, encode in (("clip_i", encoders.clip_image), ("dino", encoders.dino)):
            if encode is None:
                continue
            embedded = encode(pictures)
            columns[metric] = (embedded @ encode(photos).T).mean(dim=1)
            if metric == "clip_i" and encoders.clip_text is not None:
                texts = encoders.clip_text([image.prompt for image in own])
                columns["clip_t"] = (embedded * texts).sum(dim=1)
        for row, image in enumerate(own):
            scores[image] = {metric: 100 * float(column[row]) for metric, column in columns.items()}
        bar.update(len(own))
    bar.close()
    return scores


def mean_by_subject(scores: Mapping[Drawn, Mapping[str, float]], metric: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for image, of in scores.items():
        values.setdefault(image.subject, []).append(of[metric])
    return {subject: float(np.mean(of)) for subject, of in values.items()}


@dataclass(frozen=True)
class SubjectDifference:
    """B − A of one metric: the mean over subjects with its 95 % interval, ``p`` after Holm's correction over the
    metrics, and images of which B's score is higher (``win``), as high (``tie``) and lower (``loss``)."""

    a: float
    b: float
    points: float
    low: float
    high: float
    p: float
    win: int
    tie: int
    loss: int
    subjects: int


def compare_scores(
    a: Mapping[Drawn, Mapping[str, float]], b: Mapping[Drawn, Mapping[str, float]], *, tie: float, seed: int = 0
) -> dict[str, SubjectDifference]:
    """Metric → difference of two methods' scores of the same images.

    Args:
        tie: images whose scores differ by less than so many points count as alike.
    """
    generator, found = np.random.default_rng(seed), {}
    metrics = [metric for metric in METRICS if all(metric in of for of in (*a.values(), *b.values()))]
    for metric in metrics:
        first, second = mean_by_subject(a, metric), mean_by_subject(b, metric)
        units = [Unit(name, second[name] - first[name]) for name in first]
        differences = np.array([b[image][metric] - a[image][metric] for image in a])
        points = float(np.mean([unit.value for unit in units]))
        low, high = interval(bootstrap(with_spread(units), generator))
        found[metric] = SubjectDifference(
            float(np.mean(list(first.values()))), float(np.mean(list(second.values()))), points,
            min(low, points), max(high, points), sign_flip(units, generator),
            int((differences >= tie).sum()), int((abs(differences) < tie).sum()), int((differences <= -tie).sum()),
            len(units),
        )  # fmt: skip
    adjusted = holm([difference.p for difference in found.values()])
    return {m: SubjectDifference(**{**vars(d), "p": p}) for (m, d), p in zip(found.items(), adjusted, strict=True)}


def scores_table(scores: Mapping[str, Mapping[Drawn, Mapping[str, float]]]) -> str:
    """Method → its means over subjects, a line each."""
    metrics = [metric for metric in METRICS if all(metric in of for s in scores.values() for of in s.values())]
    lines = [f"{'':<24}" + "".join(f"{METRICS[metric]:>9}" for metric in metrics) + f"{'images':>9}{'subjects':>10}"]
    for name, of in scores.items():
        means = [np.mean(list(mean_by_subject(of, metric).values())) for metric in metrics]
        subjects = len({image.subject for image in of})
        lines.append(f"{name[-24:]:<24}" + "".join(f"{m:>9.2f}" for m in means) + f"{len(of):>9}{subjects:>10}")
    return "\n".join(lines)


def difference_table(differences: Mapping[str, SubjectDifference]) -> str:
    lines = [f"{'B - A':<8}{'points':>8}{'95 % over subjects':>22}{'p':>8}{'win':>7}{'tie':>7}{'loss':>7}"]
    for metric, d in differences.items():
        span = f"{d.low:+.2f} to {d.high:+.2f}"
        lines.append(f"{METRICS[metric]:<8}{d.points:>+8.2f}{span:>22}{d.p:>8.3f}{d.win:>7}{d.tie:>7}{d.loss:>7}")
    if differences and min(d.subjects for d in differences.values()) < 2:
        return "\n".join([*lines, "One subject says nothing about others: the interval needs several."])
    better = [METRICS[m] for m, d in differences.items() if d.p < 0.05 and d.points > 0]
    worse = [METRICS[m] for m, d in differences.items() if d.p < 0.05 and d.points < 0]
    said = [f"{word} by {', '.join(of)}" for word, of in (("B is better", better), ("A is better", worse)) if of]
    return "\n".join([*lines, "; ".join(said) + "." if said else "No difference above the noise was seen."])
