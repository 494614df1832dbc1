"""A subject, taught to a small Stable Diffusion XL with LoRA and with MoSLoRA: a small run of the paper's section 4.3.

    bash playground/demo_inputs.sh && python benchmarks/subject.py

The base (subject_base.py) draws EasyVQA's coloured shapes from captions. The subject is a circle in magenta, which the
set has not: four of its drawings, recoloured, all with the prompt "a ikat circle". Both methods are trained by
scripts/train_sdxl.py, exported by its export, and drawn by stock diffusers. It shows the road and the pairing, on
drawings of 16 × 16 pixels; it says nothing about photos or about the real model's quality.

Protocol, written down before a result was seen:

- Rank 4, alpha 4, 100 steps of 4 drawings, AdamW at a constant rate. Pictures, crops, noise and timesteps are the same
  for both methods at a seed, and so are the latents that every image is drawn from.
- The learning rate is chosen for each method on seed 100 alone, out of 2.5e-4, 1e-3, 4e-3 and 1.6e-2: the highest mean
  of the four measures. Then seeds 0 to 4. (The lowest rate was added when both methods had chosen 1e-3 of the other
  three, before a result of the comparison had been seen.)
- 24 images of "a ikat circle", "a ikat rectangle", "a ikat triangle", and 24 of a colour and a shape that the base
  knows, without the word. 20 steps, guidance 3. Four measures, in percent:

      likeness   of the images of "a ikat circle": 100 × cosine to the subject's pictures, mean over all pairs, of what
                 the project's tower (playground/clip-tiny) says of an image
      colour     of the images with the word: their figure's colour is nearest to the subject's, out of nine
      shape      of the same images: the figure has the shape that was asked for
      kept       of the images without the word: colour and shape are those that were asked for

  Colour and shape are read from pixels; how often that is right on EasyVQA's own drawings is in the result.
- MoSLoRA minus LoRA by seed: the mean, its 95 % t-interval, the paired t-test, Holm's correction over the four. Where
  the corrected p is below 0.05 MoSLoRA is called better or worse, else "no difference above X was seen", X the
  interval's farther end. The intervals are over seeds of the training: there is one subject and one base.

Finished parts are kept in ``--work``; the same command goes on after a kill. Written: benchmarks/results/subject.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores, and sums are formed in one order
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
from subject_base import SIDE, Drawings, make_base, make_vae, read_drawings
from subject_report import COLOURS, SUBJECT_COLOUR, PixelReader, measure, report, table

from llava_moslora.errors import Refusal, run_script
from llava_moslora.evaluation.subject_images import Drawn, load_lora, load_pipeline
from llava_moslora.files.disk import replace_json
from llava_moslora.noise import quiet_libraries, quiet_loading

ROOT = Path(__file__).parent.parent
ARMS = {"lora": ["--mixer_init", "identity", "--train_mixer", "False"], "moslora": ["--mixer_init", "orthogonal"]}
RATES, TUNING_SEED, SEEDS = (2.5e-4, 1e-3, 4e-3, 1.6e-2), 100, tuple(range(5))
STEPS, BATCH, RANK, PICTURES, SAMPLER_STEPS, GUIDANCE = 100, 4, 4, 4, 20, 3.0
PROMPT, SHAPES = "a ikat circle", ("circle", "rectangle", "triangle")
WITH_WORD = [f"a ikat {shape}" for shape in SHAPES for _ in range(8)]
WITHOUT = [f"a {colour} {shape}" for colour in COLOURS if colour != SUBJECT_COLOUR for shape in SHAPES]
SOURCES = ("subject.py", "subject_base.py", "subject_report.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "playground/data/easy_vqa", help="EasyVQA")
    parser.add_argument("--work", type=Path, default=ROOT / "playground/runs/subject", help="base, runs, their results")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder of subject.json")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.processes < 1:
        raise Refusal("C-FLAG", "out of range", key="--processes", found=args.processes, expected="at least 1")
    if not (args.data / "captions.json").is_file():
        fix = "bash playground/demo_inputs.sh"
        raise Refusal("D-FILE", "no EasyVQA", file=args.data / "captions.json", key="--data", fix=fix)
    torch.set_num_threads(1)
    start, work = time.perf_counter(), args.work / fingerprint()
    drawings = read_drawings(args.data)
    draw_subject(drawings, work / "pictures")
    vae = kept(work / "vae.json", lambda: make_vae(drawings, work / "vae"))
    unet = kept(work / "base.json", lambda: make_base(drawings, work / "vae", work / "base"))
    tuning = [(arm, rate, TUNING_SEED) for arm in ARMS for rate in RATES]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, _start, (work, args.data)) as pool:
        base, *others = results(pool, [None, *tuning])
        tuned = dict(zip(tuning, others, strict=True))
        chosen = {arm: max(RATES, key=lambda rate, arm=arm: tuned[arm, rate, TUNING_SEED]["mean"]) for arm in ARMS}
        runs = [(arm, chosen[arm], seed) for seed in SEEDS for arm in ARMS]
        found = dict(zip(runs, results(pool, runs), strict=True))
    seconds = [one["cpu_seconds"] for one in (vae, unet, base, *tuned.values(), *found.values())]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    content = {
        "vae": vae, "unet": unet, "untuned": base, "rates": chosen,
        "tuning": [{"arm": arm, "rate": rate} | one for (arm, rate, _), one in tuned.items()],
        "pixels_read_right": PixelReader(drawings).right(drawings),
        **report({arm: {s: found[arm, chosen[arm], s] for s in SEEDS} for arm in ARMS}),
        "versions": versions, "cpu_seconds": round(sum(seconds)), "processes": args.processes,
        "wall_seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    replace_json(args.output / "subject.json", content)
    print(table(content))


def fingerprint() -> str:
    """Of the code and the versions that decide a result."""
    text = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in SOURCES]
    text += [platform.python_version(), torch.__version__, diffusers.__version__]
    return hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]


def kept(file: Path, make: Any) -> Any:
    """The content of ``file``, made where it is missing."""
    if not file.is_file():
        content = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_json(file, content)
    return json.loads(file.read_text(encoding="utf-8"))


def draw_subject(drawings: Drawings, folder: Path) -> None:
    """The pictures that are trained: circles of EasyVQA in the subject's colour."""
    folder.mkdir(parents=True, exist_ok=True)
    circles = [n for n, caption in enumerate(drawings.captions) if caption.endswith(" circle")][:PICTURES]
    for number in circles:
        drawings.recoloured(number, COLOURS[SUBJECT_COLOUR]).save(folder / f"{number}.png")


def results(pool: ProcessPoolExecutor, runs: list) -> list[dict[str, Any]]:
    """Of each run, in their order; None is the base alone."""
    waiting = [pool.submit(_one, run) for run in runs]
    return [one.result() for one in waiting]


_HERE: dict[str, Any] = {}


def _start(work: Path, data: Path) -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    quiet_loading()
    _HERE.update(work=work, reader=PixelReader(read_drawings(data)))


def _one(run: tuple[str, float, int] | None) -> dict[str, Any]:
    name = "untuned" if run is None else "{}-{:g}-{}".format(*run)
    return kept(_HERE["work"] / "results" / f"{name}.json", lambda: _run(run, name))


def _run(run: tuple[str, float, int] | None, name: str) -> dict[str, Any]:
    start, work = time.process_time(), _HERE["work"]
    pipeline = load_pipeline(work / "base", "float32")
    if run is not None:
        with printing_to(work / f"{name}.log"):
            export = train(*run, work, work / "runs" / name)
        load_lora(pipeline, export)
    images = draw(pipeline, WITH_WORD) + draw(pipeline, WITHOUT)
    for number, image in enumerate(images):
        place = work / "drawn" / name
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{number:02}.png")
    result = measure(images, WITH_WORD + WITHOUT, work / "pictures", _HERE["reader"], ROOT / "playground/clip-tiny")
    print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in result.items()), flush=True)
    return result | {"cpu_seconds": round(time.process_time() - start, 1)}


def train(arm: str, rate: float, seed: int, work: Path, run: Path) -> Path:
    """One run of scripts/train_sdxl.py; the folder of its exported LoRA."""
    from llava_moslora.diffusion.export import export_lora

    sys.path.insert(0, str(ROOT))
    from scripts.train_sdxl import main as train_sdxl

    shutil.rmtree(run, ignore_errors=True)  # of a kill
    flags = {
        "model_name_or_path": work / "base", "image_folder": work / "pictures", "prompt": PROMPT, "resolution": SIDE,
        "data_cache": work / "cache", "lora_r": RANK, "lora_alpha": RANK, "per_device_train_batch_size": BATCH,
        "max_steps": STEPS, "save_steps": STEPS, "learning_rate": rate, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "seed": seed, "report_to": "none", "disable_tqdm": True, "output_dir": run / "run",
    }  # fmt: skip
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    sys.argv = ["scripts/train_sdxl.py", *words, *ARMS[arm]]
    train_sdxl()
    return export_lora(run / "run", run / "lora", prove=False)


@contextmanager
def printing_to(file: Path) -> Iterator[None]:
    with open(file, "w", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        yield


def draw(pipeline: Any, prompts: list[str]) -> list:
    """An image of each prompt, from the latent of its number alone."""
    return pipeline(
        prompts, height=SIDE, width=SIDE, num_inference_steps=SAMPLER_STEPS, guidance_scale=GUIDANCE,
        generator=[Drawn("subject", number, prompt, 0).generator() for number, prompt in enumerate(prompts)],
    ).images  # fmt: skip


if __name__ == "__main__":
    quiet_libraries()
    run_script(main)
