"""Verification of an export: stock libraries, in a fresh process, must compute the same outputs as the run.

The run is merged in memory by PEFT and rounded to the dtype of the export (merged_run.py); the two then differ only by
the order of float32 sums. From the run as it was trained the export also differs by rounding and, over a
4-bit LLM, by the choice of merge base: that is reported, but never an error.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from llava_moslora.errors import Refusal, failure_in
from llava_moslora.export import probe
from llava_moslora.export.merged_run import MAX_NEW_TOKENS, RunAnswer, answers_of_run, trained_over_another_llm
from llava_moslora.export.target import ExportPlan, Target
from llava_moslora.export.targets import llm
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import write_weights
from llava_moslora.files.disk import write_json
from llava_moslora.files.tensors import save_tensors
from llava_moslora.inference.generate import Question
from llava_moslora.text.conversation import Turn
from llava_moslora.text.templates import stop_token_ids
from llava_moslora.text.tokenizer import image_token_id

PROBE, QUESTIONS, FEATURES = "probe", "questions.json", "features.safetensors"
# Relative to the largest value. The same merge in two orders of summing rounds a few 16-bit weights differently.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.float16: 1e-3}
LLAMA_COPY = ".llm-base"  # for verifying an export over an InternLM2: the same LLM as a Llama


def prove(
    trained: TrainedRun, target: Target, plan: ExportPlan, folder: Path, dtype: torch.dtype, mapped: bool = False
) -> dict:
    """Compare the export in ``folder`` with the run; the report, for ``export_report.json``.

    Args:
        mapped: :func:`llava_moslora.export.mapped_weights.needed`.

    Raises:
        Refusal: K-PROOF, they differ; the differences are in the message.
    """
    questions = write_questions(trained, plan, folder, mapped)
    given = folder / PROBE / FEATURES
    features = load_file(given)["features"] if given.is_file() else None
    expected, as_trained = answers_of_run(trained, target, plan, questions, features, dtype, mapped)
    _complete_questions(trained, plan, folder, expected)
    found = _run_probe(folder)
    shutil.rmtree(folder / LLAMA_COPY, ignore_errors=True)
    _check_numbers(trained, expected, as_trained, found)
    report = _compare(expected, as_trained, found)
    report |= {
        "process": "a fresh one, with stock libraries only; repeat it with probe/probe.py",
        "versions": {n: metadata.version(n) for n in ("torch", "transformers", "peft", "safetensors", "pillow")},
        "bound_relative_to_the_largest": BOUNDS[dtype if plan.rounded else torch.float32],
        "exact": "merge" if "llm" in target.merged and plan.rounded and trained.adapter else "export",
        "cause_of_that_difference": _cause(trained, target, plan, dtype),
        "llm_weights": "memory-mapped, for lack of memory" if mapped else "held in float32",
    }
    if "answer" in report["compared"]:
        answers = [found[f"answer.{n}"] for n in range(len(expected)) if f"answer.{n}" in found]
        report["answers"] = [trained.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    _refuse_differences(trained, report)
    return report


def write_questions(trained: TrainedRun, plan: ExportPlan, folder: Path, mapped: bool) -> list[Question]:
    """Write ``probe/``: the script that answers the questions, the questions without their token ids, the images."""
    place = folder / PROBE
    place.mkdir(exist_ok=True)
    images = {"0.png": _image(0, 96, 64), "1.png": _image(1, 48, 80)}
    for name, image in images.items():
        image.save(place / name)
    questions = [
        (["0.png"], [Turn("human", "<image>\nWhat is shown in the image?")]),
        (["1.png"], [Turn("human", "<image>\nWhich colour?"), Turn("gpt", "red"), Turn("human", "Are you sure?")]),
        ([], [Turn("human", "Name a colour.")]),
    ]
    if trained.adapter is None:  # stage 1 trains on image captions only
        questions = questions[:1]
    if ("llm" in plan.load_from and "projector" not in plan.load_from) or trained.text_only:
        questions = [(names, turns) for names, turns in questions if not names]
    if list(plan.load_from) == ["projector"]:  # there is no vision tower to compute features
        shape = 1, 16, trained.vision_config.hidden_size
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        save_tensors({"features": noise}, place / FEATURES)
    shutil.copyfile(probe.__file__, place / "probe.py")
    content = {
        "load_from": plan.load_from,
        "mapped": mapped,
        "max_new_tokens": MAX_NEW_TOKENS,
        "stop": stop_token_ids(trained.tokenizer, trained.template),
        "pad_token_id": trained.tokenizer.pad_token_id,
        "image_token_id": -1 if trained.text_only else image_token_id(trained.tokenizer),  # -1: no token's
        "pads": trained.pads,
        "questions": [
            {"images": names, "turns": [{"role": turn.role, "text": turn.text} for turn in turns]}
            for names, turns in questions
        ],
    }
    write_json(place / QUESTIONS, content)
    return [([images[name] for name in names], turns) for names, turns in questions]


def _image(seed: int, width: int, height: int) -> Image.Image:
    """A coloured gradient with two rectangles on it."""
    random = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (1 - x) * y], axis=-1) * random.integers(120, 255, 3)
    for _ in range(2):
        left, top = random.integers(0, width // 2), random.integers(0, height // 2)
        pixels[top : top + height // 3, left : left + width // 3] = random.integers(0, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def _complete_questions(trained: TrainedRun, plan: ExportPlan, folder: Path, expected: list[RunAnswer]) -> None:
    """Add the token ids; and for adapters over an InternLM2, which stock libraries cannot load, write it as a Llama."""
    file = folder / PROBE / QUESTIONS
    content = json.loads(file.read_text(encoding="utf-8"))
    for question, answer in zip(content["questions"], expected, strict=True):
        question["ids"] = answer["ids"].tolist()
    if "llm_adapter" in plan.load_from and "llm" not in plan.load_from:
        write_weights(folder, [llm.weights(trained, torch.float32, LLAMA_COPY, merged=False)])
        llm.write_files(trained, folder / LLAMA_COPY, torch.float32)
        content["load_from"]["llm"] = LLAMA_COPY
    write_json(file, content)


def _run_probe(folder: Path) -> dict[str, Tensor]:
    """What ``probe.py`` computed in a fresh process: ``what.number`` → tensor.

    Raises:
        Refusal: K-PROOF, stock libraries cannot load the export; E-DISK, E-MEMORY.
    """
    output = folder / PROBE / ".found.safetensors"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, str(folder / PROBE / "probe.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        if failure := failure_in(done.stderr, output):
            raise failure
        if done.returncode == -signal.SIGKILL:
            raise Refusal(
                "E-MEMORY", "the verification process was killed, probably for lack of memory", file=folder,
                fix="--no_proof, or export on a larger machine",
            )  # fmt: skip
        raise Refusal(
            "K-PROOF", "stock libraries cannot load the export", file=folder,
            found=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}",
            fix=f"run it to see why: {' '.join(command)}",
        )  # fmt: skip
    found = load_file(output)
    output.unlink()
    return found


def _check_numbers(
    trained: TrainedRun, expected: list[RunAnswer], as_trained: list[Tensor], found: dict[str, Tensor]
) -> None:
    """Refuse (K-PROOF) values for which a comparison is meaningless: NaN, Inf, or all zeros."""
    values = [("the run as trained", "logits", logits) for logits in as_trained]
    values += [("the merged run", key, value) for answer in expected for key, value in answer.items()]
    values += [("the export", key.split(".")[0], value) for key, value in found.items()]
    for side, key, value in values:
        if not value.is_floating_point() or (value.isfinite().all() and value.any()):
            continue
        raise Refusal(
            "K-PROOF", "the values to compare are not finite, or all zero", file=trained.run, key=key,
            found=f"{_described(value)} from {side}", expected="finite values, not all zero",
            fix="export an earlier checkpoint, and look for NaN and Inf in the base and in metrics.jsonl",
        )  # fmt: skip


def _described(value: Tensor) -> str:
    for kind, where in (("NaN", value.isnan()), ("Inf", value.isinf())):
        if where.any():
            return f"{int(where.sum())} {kind} of {value.numel()}"
    return f"{value.numel()} zeros"


def _compare(expected: list[RunAnswer], as_trained: list[Tensor], found: dict[str, Tensor]) -> dict:
    """The differences of everything that both sides computed."""
    largest: dict[str, float] = {}
    difference: dict[str, float] = {}
    same: dict[str, bool] = {}
    from_trained = None
    for number, answer in enumerate(expected):
        for key, value in answer.items():
            theirs = found.get(f"{key}.{number}")
            if theirs is None:
                continue
            if key in ("ids", "answer"):
                same[key] = same.get(key, True) and theirs.tolist() == value.tolist()
                continue
            if key == "logits":  # an original LLM lacks the rows of appended tokens, which no adapter changes
                value = value[: len(theirs)]
                moved = (theirs - as_trained[number][: len(theirs)]).abs().max().item()
                from_trained = max(from_trained or 0.0, moved)
            largest[key] = max(largest.get(key, 0.0), value.abs().max().item())
            away = (theirs.reshape(value.shape) - value).abs().max().item()
            difference[key] = max(difference.get(key, 0.0), away)
    assert largest, "nothing was compared"
    return {
        "proof": "passed",
        "questions": len(expected),
        "compared": sorted([*same, *largest]),
        "largest_difference": difference,
        "largest_value": largest,
        "same_prompt_ids": same.get("ids"),
        "same_greedy_answers": same.get("answer"),
        "logits_difference_from_the_run_as_trained": from_trained,
    }


def _cause(trained: TrainedRun, target: Target, plan: ExportPlan, dtype: torch.dtype) -> str:
    """Why the export's logits are not those of the run as it was trained."""
    causes = []
    if plan.rounded and dtype != torch.float32:
        causes.append(f"rounding to {str(dtype).removeprefix('torch.')}")
    if trained_over_another_llm(trained, target):
        causes.append("using the LLM's original weights in place of NF4 ones")
    return " and ".join(causes) or "the order of float32 sums"


def _refuse_differences(trained: TrainedRun, report: dict) -> None:
    """Refuse (K-PROOF) a difference above the bound, and different prompts or answers."""
    bound, largest = report["bound_relative_to_the_largest"], report["largest_value"]
    wrong = [key for key, value in report["largest_difference"].items() if not value <= bound * largest[key]]
    wrong += [key for key in ("same_prompt_ids", "same_greedy_answers") if report[key] is False]
    if wrong:
        shown = ("largest_difference", "same_prompt_ids", "same_greedy_answers")
        raise Refusal(
            "K-PROOF", "the export's outputs differ from the run's", file=trained.run, key=", ".join(wrong),
            found=json.dumps({key: report[key] for key in shown}),
            expected=f"differences below {bound} of {json.dumps(largest)}, and the same answers",
            fix="please report this; --no_proof writes the export anyway",
        )  # fmt: skip
