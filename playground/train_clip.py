"""Train the demo's vision tower: a tiny plain CLIP ViT, with open_clip, on EasyVQA's training split.

    python playground/train_clip.py --data playground/data/easy_vqa --out playground/clip-tiny

No package ships a small CLIP, so the demo includes one: 64-pixel images in 16 patches, width 128, 5 layers, trained
contrastively from scratch on the training images and their 24 captions, in about three minutes. Every batch holds
each caption at most once: two red circles in one batch would be false negatives of each other. The result is rounded to
fp16 and converted to a ``CLIPVisionModel`` folder through ``llava_moslora.models.vision``, as any open_clip tower would
be. One seed, one thread: a second run writes the same bytes on the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch.optim import lr_scheduler
from transformers import CLIPVisionModel

from llava_moslora.errors import Refusal, run_script
from llava_moslora.models.vision import from_open_clip

SEED = 0
ARCHITECTURE = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 128, "head_width": 32, "layers": 5, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}
GROUPS = 4  # batches of distinct captions that share one optimizer step
EPOCHS = 30
PEAK_LR, WEIGHT_DECAY, WARMUP = 1e-3, 0.05, 100
SHIFT = 4  # pixels; more would push the smallest shapes out of the image

# B images in a batch, C captions, P patches, E vision width.


def load_images(data: Path, names: list[str]) -> torch.Tensor:
    """float[N, 3, 64, 64]: the images as open_clip's own inference transform gives them."""
    size = ARCHITECTURE["vision_cfg"]["image_size"]
    transform = open_clip.image_transform(size, is_train=False, **PREPROCESS)
    return torch.stack([transform(Image.open(data / "images" / name)) for name in names])


def epoch_batches(by_caption: dict[str, list[int]], rng: random.Random) -> list[list[tuple[str, int]]]:
    """Every image once, in random batches in which no caption appears twice."""
    queues = {caption: rng.sample(images, len(images)) for caption, images in by_caption.items()}
    batches = []
    while queues:
        batches.append([(caption, queue.pop()) for caption, queue in queues.items()])
        queues = {caption: queue for caption, queue in queues.items() if queue}
    rng.shuffle(batches)
    return batches


def train(images: torch.Tensor, captions: list[str]) -> open_clip.CLIP:
    """Contrastive training; ``captions[i]`` describes ``images[i]``."""
    by_caption = defaultdict(list)
    for index, caption in enumerate(captions):
        by_caption[caption].append(index)
    by_caption = dict(sorted(by_caption.items()))
    tokens = dict(zip(by_caption, tokenize(list(by_caption)), strict=True))

    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    model = open_clip.CLIP(**ARCHITECTURE)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    kept = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98))
    # A dry draw of the batches fixes the number of steps that the schedule spans.
    total = EPOCHS * -(-len(epoch_batches(by_caption, random.Random(SEED))) // GROUPS)
    warmup = lr_scheduler.LinearLR(optimizer, 1e-2, total_iters=WARMUP)
    decay = lr_scheduler.CosineAnnealingLR(optimizer, total - WARMUP)
    schedule = lr_scheduler.SequentialLR(optimizer, [warmup, decay], [WARMUP])
    started = time.monotonic()
    for epoch in range(EPOCHS):
        batches, losses = epoch_batches(by_caption, rng), []
        for start in range(0, len(batches), GROUPS):
            step = batches[start : start + GROUPS]
            chosen = torch.tensor([index for batch in step for _, index in batch])
            views = moved(images[chosen], rng)  # (B, 3, 64, 64)
            image_features = F.normalize(model.encode_image(views), dim=-1)  # (B, 64)
            text_features = dict(zip(tokens, encode_texts(model, list(tokens.values())), strict=True))
            loss, position = 0.0, 0
            for batch in step:  # each batch is contrasted within itself only
                texts = torch.stack([text_features[caption] for caption, _ in batch])
                logits = model.logit_scale.exp() * image_features[position : position + len(batch)] @ texts.T
                position += len(batch)
                targets = torch.arange(len(batch))
                loss = loss + (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / (2 * len(step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=4.6052)  # 100, as in CLIP
            losses.append(loss.item())
        spent = time.monotonic() - started
        mean = sum(losses) / len(losses)
        print(f"  epoch {epoch + 1:2}/{EPOCHS}  loss {mean:.4f}  {spent:4.0f} s", flush=True)
    return model.eval()


def moved(images: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """float[B, 3, 64, 64]: each image mirrored or not and shifted by a few pixels, which keeps shape and colour."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [SHIFT] * 4, mode="replicate")
    views = []
    for image in padded:
        top, left = rng.randint(0, 2 * SHIFT), rng.randint(0, 2 * SHIFT)
        view = image[:, top : top + height, left : left + width]
        views.append(view.flip(-1) if rng.random() < 0.5 else view)
    return torch.stack(views)


def tokenize(captions: list[str]) -> torch.Tensor:
    """int[C, 8]: CLIP's own byte pairs."""
    return open_clip.SimpleTokenizer(context_length=ARCHITECTURE["text_cfg"]["context_length"])(captions)


def encode_texts(model: open_clip.CLIP, tokens: list[torch.Tensor]) -> torch.Tensor:
    return F.normalize(model.encode_text(torch.stack(tokens)), dim=-1)  # (C, 64)


@torch.no_grad()
def zero_shot(model: open_clip.CLIP, images: torch.Tensor, truth: list[str], captions: list[str]) -> dict[str, float]:
    """Share of images whose nearest caption names the right colour, the right shape, and both."""
    nearest = (model.encode_image(images) @ encode_texts(model, list(tokenize(captions))).T).argmax(-1)
    pairs = [(captions[i].split()[1:], caption.split()[1:]) for i, caption in zip(nearest.tolist(), truth, strict=True)]
    shares = {"color": [g[0] == t[0] for g, t in pairs], "shape": [g[1] == t[1] for g, t in pairs]}
    shares["both"] = [g == t for g, t in pairs]
    return {name: sum(right) / len(right) for name, right in shares.items()}


@torch.no_grad()
def patch_features(tower: CLIPVisionModel, images: torch.Tensor) -> torch.Tensor:
    """float[N, P, E]: what a LLaVA projector reads, the last but one layer's patches."""
    return torch.cat([tower(b, output_hidden_states=True).hidden_states[-2][:, 1:] for b in images.split(256)])


def linear_probe(fit: torch.Tensor, fit_truth: list[str], test: torch.Tensor, truth: list[str]) -> dict[str, float]:
    """Test accuracy of a linear classifier on the patches' mean, for colour and for shape."""
    mean, std = fit.mean((0, 1)), fit.mean(1).std(0)
    x, y = (fit.mean(1) - mean) / std, (test.mean(1) - mean) / std
    accuracy = {}
    for name, word in (("color", 1), ("shape", 2)):
        labels = sorted({caption.split()[word] for caption in fit_truth})
        target, wanted = (torch.tensor([labels.index(c.split()[word]) for c in cs]) for cs in (fit_truth, truth))
        layer = torch.nn.Linear(x.shape[1], len(labels))
        torch.nn.init.zeros_(layer.weight)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure(layer=layer, optimizer=optimizer, target=target):
            optimizer.zero_grad()
            loss = F.cross_entropy(layer(x), target) + 1e-4 * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        accuracy[name] = (layer(y).argmax(-1) == wanted).float().mean().item()
    return accuracy


def test_captions(data: Path) -> dict[str, str]:
    """{image: caption} of the test split, as far as "what color" and "what shape" questions give both."""
    seen = defaultdict(dict)
    for q in json.loads((data / "test.json").read_text(encoding="utf-8")):
        if q["question"].startswith("what"):
            seen[q["image"]]["color" if "color" in q["question"].split() else "shape"] = q["answer"]
    return {image: f"a {s['color']} {s['shape']}" for image, s in seen.items() if len(s) == 2}


@torch.no_grad()
def round_to_half(visual: torch.nn.Module) -> None:
    """Make every weight one that fp16 can hold: the folder saved in fp16 then *is* this model, not a copy near it."""
    for weight in visual.parameters():
        weight.copy_(weight.half())


def save_tower(model: open_clip.CLIP, out: Path) -> CLIPVisionModel:
    """Convert and write in the key names that transformers 4 and 5 both read."""
    tower, processor = from_open_clip(ARCHITECTURE, model.state_dict(), PREPROCESS)
    state = {f"vision_model.{name}": tensor.half().contiguous() for name, tensor in tower.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    tower.config.architectures, tower.config.dtype = ["CLIPVisionModel"], torch.float16
    tower.config.save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    return tower


def readme(zero: dict[str, float], probe: dict[str, float], count: int) -> str:
    return f"""# clip-tiny

The demo's vision tower: a plain CLIP ViT (`CLIPVisionModel`, 64×64 pixels, 16 patches of 16×16, width 128, 5 layers,
fp16), trained from scratch with open_clip on the training split of EasyVQA. Made by

    make demo-parts

that is, `python playground/train_clip.py --data playground/data/easy_vqa --out playground/clip-tiny`. Only training
images and captions deduced from training questions were used. Accuracy on {count} test images:

| | colour | shape | both |
| --- | --- | --- | --- |
| zero-shot, nearest of 24 captions | {zero["color"]:.1%} | {zero["shape"]:.1%} | {zero["both"]:.1%} |
| linear probe on the mean patch of the last but one layer | {probe["color"]:.1%} | {probe["shape"]:.1%} | |

Licence: Apache-2.0, like this repository. The images are EasyVQA's (MIT) and not part of this folder.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by easy_vqa.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced when training has succeeded")
    args = parser.parse_args()
    if not (args.data / "captions.json").is_file():
        fix = f"python playground/easy_vqa.py --packages … --out {args.data}"
        raise Refusal("D-MISSING", "the captions are not there", file=args.data / "captions.json", fix=fix)
    # One thread: sums are formed in one order whatever the number of cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    records = json.loads((args.data / "captions.json").read_text(encoding="utf-8"))
    captions = [record["conversations"][1]["value"] for record in records]
    images = load_images(args.data, [record["image"] for record in records])
    test = test_captions(args.data)
    test_images, truth = load_images(args.data, list(test)), list(test.values())
    print(f"{len(captions)} training images, {len(set(captions))} captions; {len(truth)} test images", flush=True)
    model = train(images, captions)

    staging = args.out.parent / f".{args.out.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    staging.mkdir(parents=True)
    round_to_half(model.visual)
    tower = save_tower(model, staging)
    zero = zero_shot(model, test_images, truth, sorted(set(captions)))
    probe = linear_probe(patch_features(tower, images), captions, patch_features(tower, test_images), truth)
    (staging / "README.md").write_text(readme(zero, probe, len(truth)), encoding="utf-8")
    shutil.rmtree(args.out, ignore_errors=True)
    os.rename(staging, args.out)
    print("zero-shot    " + "  ".join(f"{name} {share:.1%}" for name, share in zero.items()))
    print("linear probe " + "  ".join(f"{name} {share:.1%}" for name, share in probe.items()))


if __name__ == "__main__":
    run_script(main)
