"""The proof of an export: stock libraries, in a fresh process, compute what the run computes.

The run is loaded as training left it, with its adapters beside the weights. Its copy is merged in memory by PEFT's own
code and rounded to the dtype of the export; the two sides then differ by the order of float32 sums alone. What rounding
and, over a 4-bit LLM, the choice of merge base change is a property of the export, no fault, and is reported.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava_moslora.errors import Refusal
from llava_moslora.export import mapped_weights, probe
from llava_moslora.export.target import Layout
from llava_moslora.export.trained_run import DEQUANTIZED, TrainedRun
from llava_moslora.files.json import write_json
from llava_moslora.inference.generate import Question, batch
from llava_moslora.inference.load import ChatModel, load_run
from llava_moslora.models.names import part_of
from llava_moslora.models.towers import kind_of
from llava_moslora.text.conversation import Turn, stop_token_ids
from llava_moslora.text.tokenizer import image_token_id

PROBE, QUESTIONS, FEATURES = "probe", "questions.json", "features.safetensors"
MAX_NEW_TOKENS = 16
# Of the largest logit. The same merge in two orders of summing rounds a few 16-bit weights to the neighbouring value.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-3, torch.float16: 1e-3}
# as :attr:`Layout.rounded` names them → parts of the composed model
ROUNDED = {"llm": {"llm", "lm_head"}, "vision": {"vision_tower"}, "projector": {"projector"}}
ROUNDED["base"] = set().union(*ROUNDED.values())
STAND_IN = ".llm-base"  # an InternLM2 as a Llama, for the time of the proof


def write_probe(trained: TrainedRun, layout: Layout, folder: Path, mapped: bool) -> list[Question]:
    """``probe/``: images, questions with the ids that our ``encode`` gives them, and the script that answers them."""
    place = folder / PROBE
    place.mkdir(exist_ok=True)
    wide, tall = _image(0, 96, 64), _image(1, 48, 80)
    wide.save(place / "0.png")
    tall.save(place / "1.png")
    turns = [
        (["0.png"], [Turn("human", "<image>\nWhat is shown in the image?")]),
        (["1.png"], [Turn("human", "<image>\nWhich colour?"), Turn("gpt", "red"), Turn("human", "Are you sure?")]),
        ([], [Turn("human", "Name a colour.")]),
    ]
    if trained.adapter is None:  # stage 1 saw captions of images and nothing else
        turns = turns[:1]
    if "llm" in layout.reopen and "projector" not in layout.reopen:
        turns = [question for question in turns if not question[0]]
    images = {"0.png": wide, "1.png": tall}
    if list(layout.reopen) == ["projector"]:
        width = trained.vision_config.hidden_size
        noise = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(0))
        save_file({"features": noise}, place / FEATURES)
    shutil.copyfile(probe.__file__, place / "probe.py")
    questions = {
        "reopen": layout.reopen,
        "mapped": mapped,
        "max_new_tokens": MAX_NEW_TOKENS,
        "stop": stop_token_ids(trained.tokenizer, trained.template),
        "pad_token_id": trained.tokenizer.pad_token_id,
        "image_token_id": image_token_id(trained.tokenizer),
        "pads": trained.pads,
        "questions": [
            {"images": names, "turns": [{"role": turn.role, "text": turn.text} for turn in asked]}
            for names, asked in turns
        ],
    }
    write_json(place / QUESTIONS, questions)
    return [([images[name] for name in names], asked) for names, asked in turns]


def prove(trained: TrainedRun, layout: Layout, folder: Path, dtype: torch.dtype, mapped: bool = False) -> dict:
    """Compare the export in ``folder`` with the run; the report, for ``export_report.json``.

    Args:
        mapped: :func:`llava_moslora.export.mapped_weights.needed`.

    Raises:
        Refusal: K-PROOF, they differ; the figures are in the message.
    """
    questions = write_probe(trained, layout, folder, mapped)
    expected, as_trained = _expected(trained, layout, folder, questions, dtype, mapped)
    _complete_questions(trained, layout, folder, expected)
    found = _reopened(folder)
    shutil.rmtree(folder / STAND_IN, ignore_errors=True)
    report = _compare(trained, layout, expected, as_trained, found, dtype)
    return report | {"llm_weights": "mapped from their files, for lack of memory" if mapped else "held in float32"}


def _image(seed: int, width: int, height: int) -> Image.Image:
    """A coloured slope with two rectangles on it."""
    random = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([x, y, (1 - x) * y], axis=-1) * random.integers(120, 255, 3)
    for _ in range(2):
        left, top = random.integers(0, width // 2), random.integers(0, height // 2)
        pixels[top : top + height // 3, left : left + width // 3] = random.integers(0, 255, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def _expected(trained: TrainedRun, layout: Layout, folder: Path, questions: list[Question], dtype, mapped: bool):
    """What the run computes for each question once merged and rounded as exported, and the logits as it was trained."""
    # Adapters that were trained over NF4 weights are exported over the original ones, unless merged into the former.
    quantised = trained.bits == 4 and not (layout.merged and trained.merge_base == DEQUANTIZED)
    chat_model = _load(trained, trained.bits, mapped)
    as_trained = _logits(chat_model, questions)
    if quantised:
        del chat_model  # one model in memory at a time
        chat_model = _load(trained, 16, mapped)
    if layout.merged and trained.adapter is not None and mapped:
        mapped_weights.merge_where_used(_inner(chat_model), dtype)
    elif layout.merged and trained.adapter is not None:
        _merge(chat_model, dequantised=trained.bits == 4 and not quantised)
    _round(chat_model, layout, dtype)
    stop, pad = stop_token_ids(trained.tokenizer, trained.template), trained.tokenizer.pad_token_id
    result = []
    with torch.inference_mode():
        for question in questions:
            inputs = batch(chat_model, [question])
            row = {"ids": inputs["input_ids"][0], "logits": chat_model.model(**inputs).logits[0, -1].float()}
            output = chat_model.model.generate(
                **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=stop, pad_token_id=pad
            )
            row["answer"] = output[0, inputs["input_ids"].shape[1] :]
            inner = _inner(chat_model)
            if "pixel_values" in inputs:
                row["features"] = _features(inner, inputs["pixel_values"])
                row["projected"] = inner.model.multi_modal_projector(row["features"])
            if (noise := folder / PROBE / FEATURES).is_file():
                row["projected"] = inner.model.multi_modal_projector(load_file(noise)["features"])
            result.append(row)
    return result, as_trained


@torch.inference_mode()
def _logits(chat_model: ChatModel, questions: list[Question]) -> list[Tensor]:
    return [chat_model.model(**batch(chat_model, [question])).logits[0, -1].float() for question in questions]


def _load(trained: TrainedRun, bits: int, mapped: bool) -> ChatModel:
    stored = trained.llm_config.dtype if mapped and bits == 16 else None
    chat_model = load_run(
        trained.run,
        checkpoint=trained.checkpoint,
        llm=trained.llm_folder,
        vision_tower=trained.vision_spec,
        bits=bits,
        llm_dtype=stored,
    )
    if stored is not None:
        inner = _inner(chat_model)
        for part in (inner.model.language_model, inner.lm_head):
            probe.compute_in_float32(part)
    return chat_model


def _inner(chat_model: ChatModel):
    model = chat_model.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _features(model, pixels: Tensor) -> Tensor:
    """What the projector is given (N, P, E): the training model's last layer is the one before the complete tower's."""
    layer, skipped = model.config.vision_feature_layer, kind_of(model.config.vision_config).class_tokens
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer][:, skipped:]


def _merge(chat_model: ChatModel, *, dequantised: bool) -> None:
    if dequantised:
        from llava_moslora.adapters.bnb import merge_over_4bit

        chat_model.model, _ = merge_over_4bit(chat_model.model)
    else:
        chat_model.model = chat_model.model.merge_and_unload()


@torch.no_grad()
def _round(chat_model: ChatModel, layout: Layout, dtype: torch.dtype) -> None:
    """Round the parameters that the export holds in ``dtype``: not its adapters and what is saved beside them."""
    parts = {part for name in layout.rounded for part in ROUNDED[name]}
    apart = ("lora_",) if layout.merged else ("lora_", "modules_to_save")
    for name, parameter in chat_model.model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype == dtype:  # in NF4; mapped in what it is written in
            continue
        if part_of(name) in parts and not any(word in name for word in apart):
            parameter.data = parameter.data.to(dtype).float()


def _complete_questions(trained: TrainedRun, layout: Layout, folder: Path, expected: list[dict]) -> None:
    """Add the ids; and for adapters over an InternLM2, which no stock library loads, the same weights as a Llama."""
    file = folder / PROBE / QUESTIONS
    asked = json.loads(file.read_text(encoding="utf-8"))
    for question, row in zip(asked["questions"], expected, strict=True):
        question["ids"] = row["ids"].tolist()
    if "llm_adapter" in layout.reopen and "llm" not in layout.reopen:
        from llava_moslora.export.targets.components import llm_weights, write_llm
        from llava_moslora.export.writer import write_weights

        write_weights(folder, [llm_weights(trained, torch.float32, STAND_IN, merged=False)])
        write_llm(trained, folder / STAND_IN, torch.float32)
        asked["reopen"]["llm"] = STAND_IN
    write_json(file, asked)


def _reopened(folder: Path) -> dict[str, Tensor]:
    """What ``probe.py`` found in a fresh process.

    Raises:
        Refusal: K-PROOF, stock libraries cannot open the export; E-DISK, E-MEMORY.
    """
    output = folder / PROBE / ".found.safetensors"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, str(folder / PROBE / "probe.py"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        if "No space left on device" in done.stderr:
            raise Refusal("E-DISK", "the disk is full", file=output, fix="free space, then start again")
        if done.returncode == -signal.SIGKILL:
            raise Refusal(
                "E-MEMORY", "the process of the proof was killed, as the system does for lack of memory", file=folder,
                fix="--no_proof, or export on a larger machine",
            )  # fmt: skip
        raise Refusal(
            "K-PROOF", "stock libraries cannot open the export", file=folder,
            found=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}",
            fix=f"look at it: {' '.join(command)}",
        )  # fmt: skip
    found = load_file(output)
    output.unlink()
    return found


def _check_numbers(
    trained: TrainedRun, expected: list[dict], as_trained: list[Tensor], found: dict[str, Tensor]
) -> None:
    """Refuse numbers that a comparison passes without comparing: NaN and Inf, and nothing but zeros.

    Raises:
        Refusal: K-PROOF
    """
    sides = [("the run as trained", "logits", logits) for logits in as_trained]
    for row in expected:
        sides += [("the merged run", key, value) for key, value in row.items() if value.is_floating_point()]
    sides += [("the export", key.split(".")[0], t) for key, t in found.items() if t.is_floating_point()]
    for side, key, value in sides:
        if value.isfinite().all() and value.any():
            continue
        raise Refusal(
            "K-PROOF", "the values to compare are not finite, or all zero", file=trained.run, key=key,
            found=f"{_described(value)} from {side}", expected="finite values, not all zero",
            fix="export an earlier checkpoint, and look for NaN and Inf in the base and in metrics.jsonl",
        )  # fmt: skip


def _described(value: Tensor) -> str:
    if value.isnan().any():
        return f"{int(value.isnan().sum())} NaN of {value.numel()}"
    return f"{int(value.isinf().sum())} Inf of {value.numel()}" if value.isinf().any() else f"{value.numel()} zeros"


def _compare(trained, layout, expected, as_trained, found, dtype) -> dict:
    largest = {"logits": 0.0, "features": 0.0, "projected": 0.0}
    worst = dict.fromkeys(largest, 0.0)
    compared, same = set(), {"ids": True, "answer": True}
    from_run = None
    _check_numbers(trained, expected, as_trained, found)
    for number, row in enumerate(expected):
        for key, value in row.items():
            there = found.get(f"{key}.{number}")
            if there is None:
                continue
            compared.add(key)
            if key in same:
                same[key] &= there.tolist() == value.tolist()
                continue
            if key == "logits":  # an original LLM lacks the rows of appended tokens, which no adapter touches
                value = value[: len(there)]
                difference = (there - as_trained[number][: len(there)]).abs().max().item()
                from_run = max(from_run or 0.0, difference)
            largest[key] = max(largest[key], value.abs().max().item())
            worst[key] = max(worst[key], (there.reshape(value.shape) - value).abs().max().item())
    assert compared, "nothing was compared"
    bound = BOUNDS[dtype if layout.rounded else torch.float32]
    report = {
        "proof": "passed",
        "process": "a fresh one, with stock libraries only; repeat it with probe/probe.py",
        "versions": {n: metadata.version(n) for n in ("torch", "transformers", "peft", "safetensors", "pillow")},
        "questions": len(expected),
        "compared": sorted(compared),
        "bound_relative_to_the_largest": bound,
        "largest_difference": {key: worst[key] for key in worst if key in compared},
        "largest_value": {key: largest[key] for key in largest if key in compared},
        "same_prompt_ids": same["ids"] if "ids" in compared else None,
        "same_greedy_answers": same["answer"] if "answer" in compared else None,
        # rounding, and over a 4-bit LLM the choice of merge base
        "logits_difference_from_the_run_as_trained": from_run,
    }
    if "answer" in compared:
        texts = [found[f"answer.{n}"] for n in range(len(expected)) if f"answer.{n}" in found]
        report["answers"] = [trained.tokenizer.decode(ids, skip_special_tokens=True) for ids in texts]
    over = [key for key in worst if key in compared and not worst[key] <= bound * largest[key]]
    wrong = over + [key for key in same if not same[key]]
    if wrong:
        raise Refusal(
            "K-PROOF", "the export does not compute what the run computes", file=trained.run, key=", ".join(wrong),
            found=json.dumps({key: report[key] for key in ("largest_difference", "same_prompt_ids",
                                                           "same_greedy_answers")}),
            expected=f"differences below {bound} of {json.dumps(report['largest_value'])}, and the same answers",
            fix="please report this; --no_proof writes the export all the same",
        )  # fmt: skip
    return report
