"""The model card: an export's README.md, from the records of the run and of the verification."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import torch

from llava_moslora._version import __version__
from llava_moslora.adapters.methods import METHODS
from llava_moslora.config import TowerAdapter
from llava_moslora.data.sources.saved_dataset import HUB
from llava_moslora.errors import Refusal
from llava_moslora.export.card_data import Base, base_models, front_matter, license_copies, method_name, read_base
from llava_moslora.export.formats import DEQUANTIZED, ORIGINAL
from llava_moslora.export.target import Target
from llava_moslora.export.targets.vllm import max_lora_rank
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.files.disk import read_json, write_text
from llava_moslora.files.json import parse_json
from llava_moslora.files.manifest import MANIFEST, sha256
from llava_moslora.models.towers import kind_of, tokens_per_image
from llava_moslora.runs.output_dir import DATA_REPORT
from llava_moslora.text.templates import TOKENIZER_TEMPLATE

XTUNER_TEMPLATES = {  # our templates' names in XTuner's PROMPT_TEMPLATE; None: questions are not wrapped in a template
    "chatml": "qwen_chat",
    "internlm2": "internlm2_chat",
    "llm_adapters": None,
    "llama2": "llama2_chat",
    "llama3": "llama3_chat",
    "plain": None,
    "vicuna": "vicuna",
    "vicuna_v1": "vicuna",
    TOKENIZER_TEMPLATE: None,
}
MERGED_INTO = {
    ORIGINAL: "the original 16-bit weights",
    DEQUANTIZED: "the dequantised NF4 weights used in training",
}

FOLDER = 'FOLDER = "."  # this folder; from the Hub: huggingface_hub.snapshot_download("OWNER/NAME")'


def write_card(
    trained: TrainedRun, target: Target, dtype: torch.dtype, report: dict, folder: Path, scores: dict | None = None
) -> None:
    """Write ``README.md``, and copies of the base models' licences, into the export in ``folder``.

    Args:
        report: of the verification. scores: of :func:`llava_moslora.export.card_data.read_scores`.
    """
    name = folder.name.removeprefix(".").removesuffix(".staging")
    bases = base_models(trained, target)
    kind = "An LLM" if trained.text_only else "A LLaVA"
    parts = ("llm", "data") if trained.text_only else ("llm", "vision_tower", "data")
    fingerprints = {key: trained.manifest[key] for key in parts}
    text = [
        f"---\n{front_matter(trained, target, name, bases, scores)}\n---",
        f"# {name}",
        f"{kind} tuned with {_method(trained)}, exported as `{target.name}`: {target.summary}. What it was checked "
        "against is in `export_report.json`.",
        f"## Use\n\n```python\n{usage(trained, target, folder)}\n```",
        f"## What was trained\n\n{_table(_trained_rows(trained))}",
        f"## Data\n\n{_data(trained)}",
        f"## Measured\n\n{_measured(trained, scores)}",
        f"## Verification\n\n{_proof(report)}",
        f"## Limits\n\n{_limits(trained, scores)}",
        f"## License\n\n{_licenses(bases)}",
        f"## Provenance\n\n{_table(_rows(trained, target, dtype))}",
        f"The command: `{shlex.join(trained.record.command)}`",
        "Fingerprints (SHA-256 of a file, size in bytes of weights):",
        f"```json\n{json.dumps(fingerprints, indent=1)}\n```",
    ]
    write_text(folder / "README.md", "\n\n".join(text) + "\n")
    for base in bases:
        for file, copy in zip(base.license_files, license_copies(base), strict=True):
            (folder / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / copy)


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _method(trained: TrainedRun) -> str:
    if trained.adapter is None:
        return "a new projector (stage 1)"
    method = method_name(trained)
    return "MoSLoRA (mixture-of-subspaces LoRA)" if method == "moslora" else METHODS[method].title


def usage(trained: TrainedRun, target: Target, folder: Path) -> str:
    """The target's Python with its placeholders filled in, without lines for adapters that ``folder`` lacks."""
    target_usage = target.text_usage if trained.text_only else target.usage
    assert target_usage is not None  # or the target was refused
    lines = [
        line for line in target_usage.splitlines()
        if all((folder / name).exists() for name in re.findall(r'FOLDER \+ "/([^"]+)"', line))
    ]  # fmt: skip
    text = "\n".join([FOLDER, *lines])
    text = text.replace("TEMPLATE", repr(XTUNER_TEMPLATES[trained.template]))
    places = {"LLM": str(trained.llm_folder)} | ({} if trained.text_only else {"TOWER": trained.vision_spec})
    given, found = trained.record.model, trained.record.located.model  # the card shows paths as given
    shown = {found.model_name_or_path: given.model_name_or_path}
    if found.vision_tower is not None and given.vision_tower is not None:
        shown[found.vision_tower] = given.vision_tower
    for name, place in places.items():
        base, where = read_base(name, place), str(place)
        text = text.replace(f'"{name}"', json.dumps(base.hub_id if base.certain else shown.get(where, where)))
    if "MAX_LORA_RANK" in text:
        text = text.replace("MAX_LORA_RANK", str(max_lora_rank(trained.record.adapter.lora_r)))
    if trained.text_only:
        return text
    tower = kind_of(trained.vision_config)
    return text.replace("VISION_CLASS", tower.model.__name__).replace("CLASS_TOKENS", str(tower.class_tokens))


def _trained_rows(trained: TrainedRun) -> list[tuple[str, str]]:
    record, adapter = trained.record, trained.record.adapter
    value = record.training_value
    rates = {"LLM": "learning_rate", "tower": "vision_lr", "projector": "mm_projector_lr", "mixers": "mixer_lr"}
    given = [f"{part} {rate:g}" for part, name in rates.items() if (rate := value(name)) is not None]
    rows = [("method", _method(trained))]
    if trained.adapter is None:
        rows.append(("trained", "only the projector (stage 1)"))
    elif trained.text_only:
        rows += (
            [("trained", "adapters"), ("adapters of the LLM", _adapter(adapter.llm, adapter.method))]
            if adapter.llm
            else []
        )
    else:
        rows.append(("trained", f"projector; adapters LLM r {adapter.lora_r}, tower r {adapter.vision_lora_r}"))
        towers = {"LLM": adapter.llm, "tower": adapter.vision}
        rows += [
            (f"adapters of the {name}", _adapter(tower, adapter.method)) for name, tower in towers.items() if tower
        ]
    steps = [str(trained.manifest["step"]), *([f"of {of}"] if (of := trained.manifest.get("of")) else [])]
    schedule = [str(value(name)) for name in ("lr_scheduler_type", "optim") if value(name)]
    rows += [
        ("optimizer steps", " ".join(steps)),
        ("records per step", str(record.global_batch_size or "not recorded")),
        ("learning rate", ", ".join([*given, *schedule]) or "not recorded"),
        ("precision", "bfloat16" if value("bf16") else "float16" if value("fp16") else "float32"),
        ("weights of the LLM while training", "4 bits (NF4), frozen" if trained.bits == 4 else "16 or 32 bits, frozen"),
    ]
    return rows


def _adapter(tower: TowerAdapter, method: str) -> str:
    mixer = "" if method == "moslora" else METHODS[method].title
    if method == "folded":
        mixer = f"{tower.mixer_init} mixer, folded into A at initialisation"
    mixer = mixer or f"mixers {'trained' if tower.train_mixer else 'frozen'}, {tower.mixer_init} init"
    where = ", ".join(tower.target_modules) or "every linear"
    return f"rank {tower.r}, alpha {tower.lora_alpha:g}, dropout {tower.lora_dropout:g}; {mixer}; {where}"


def _data(trained: TrainedRun) -> str:
    """Files with their numbers of records, where the run has its data report."""
    file, paths = trained.run / DATA_REPORT / "report.json", trained.record.data.data_path
    if not file.is_file():
        return "\n".join(f"- `{_file_name(path)}`" for path in paths)
    report = read_json(file)
    lines = []
    for one in report["files"]:
        share = one["seen_per_epoch"] / (one["kept"] or 1)
        often = "" if share == 1 else f", each seen {share:g} times per epoch"
        why = "held out for validation" if trained.record.data.data_share == 1 else "not used for training"
        held_out = f"; {one['held_out']:,} {why}" if one.get("held_out") else ""
        lines.append(f"- `{_file_name(one['file'])}`: {one['kept']:,} records of {one['records']:,}{often}{held_out}")
    data = trained.record.data
    images = "" if trained.text_only else f"{report['images']:,} images and "
    total = f"In all {images}{report['trained_tokens']:,} tokens{'' if data.train_on_prompt else ' of answers'}."
    if data.validation_split and "held_out" not in report:  # of an earlier version, which counted them
        total += f" Of these records a share of {data.validation_split:g} was held out from training."
    if data.data_share < 1:
        total += f" Of the remaining records a share of {data.data_share:g} was used for training."
    return "\n".join([*lines, "", total])


def _file_name(path: str) -> str:
    return path if path.startswith(HUB) else path.rstrip("/").rsplit("/", 1)[-1]


def _measured(trained: TrainedRun, scores: dict | None) -> str:
    rows = [("training loss", _loss(trained))]
    if figures := trained.manifest.get("metrics"):  # of an evaluation while training
        values = ", ".join(f"{name.removeprefix('eval_')} {value:.4g}" for name, value in figures.items())
        rows.append(("validation at this checkpoint", values))
    text = [_table(rows)]
    if scores is None:
        return text[0] + "\n\nThe export was made without benchmark results."
    head = ["| benchmark | score | 95 % interval | answers | how |", "|---|---|---|---|---|"]
    for name, one in scores["benchmarks"].items():
        value = "–" if one["score"] is None else f"{one['score']:.1f}"
        interval = "–" if one["interval"] is None else "{:.1f} to {:.1f}".format(*one["interval"])
        how = "; ".join(filter(None, (f"rules {one['rules']}", one["remarks"])))
        head.append(f"| {one.get('title', name)} | {value} | {interval} | {one['answers']} | {how} |")
    made = f"By scripts/evaluate.py of llava_moslora {scores['llava_moslora']}: {', '.join(scores['conditions'])}."
    return "\n\n".join([*text, "\n".join(head), made])


def _limits(trained: TrainedRun, scores: dict | None) -> str:
    longest, images = trained.record.data.model_max_length, []
    if not trained.text_only:
        size, tokens = trained.vision_config.image_size, tokens_per_image(trained.vision_config)
        seen = f"{size} × {size} pixels, {_images(trained)}, in {tokens} tokens"
        images = [f"- Every image is {seen}: small text is lost."]
    return "\n".join([
        *images,
        f"- It was trained on texts of up to {longest} tokens, in the prompt template `{trained.template}`.",
        "- Languages, safety and bias were not examined"
        + (": nothing but the benchmarks above was." if scores else ", and no benchmark was run for this page."),
        "- Errors of the base models are likely still present"
        + ("." if trained.text_only else ", and it may describe things that are not in an image."),
    ])  # fmt: skip


def _images(trained: TrainedRun) -> str:
    crops = trained.record.preprocessor["do_center_crop"]
    return "padded to a square" if trained.pads else "cropped" if crops else "scaled to a square"


def _licenses(bases: list[Base]) -> str:
    lines = ["This model is made from these, whose licenses apply to it:", ""]
    for base in bases:
        known, copies = base.license, license_copies(base)
        said = f"`{known.get('license_name') or known['license']}`, as its README says" if known else "not known here"
        kept = f"; its text is in {', '.join(f'`{copy}`' for copy in copies)}" if copies else ""
        lines.append(f"- {base.part}: `{base.name}`, license {said}{kept}")
    if any(base.license is None for base in bases):
        lines.append(
            "\nBefore sharing this model, look up unknown licenses, comply with them (a license may require a notice, "
            "a copy or a name), and complete `license` at the top of this file."
        )
    return "\n".join(lines)


def _rows(trained: TrainedRun, target: Target, dtype: torch.dtype) -> list[tuple[str, str]]:
    model = trained.record.model
    versions = ", ".join(f"{name} {version}" for name, version in trained.record.versions.items() if version)
    rows = [
        ("LLM", f"`{model.model_name_or_path}`{', trained over NF4' if trained.bits == 4 else ''}"),
        ("prompt template", f"`{trained.template}`"),
        ("checkpoint", f"`{trained.checkpoint.name}` of `{trained.run.name}`"),
        ("its manifest", f"SHA-256 {sha256(trained.checkpoint / MANIFEST)}"),
        ("dtype", str(dtype).removeprefix("torch.")),
        ("written by", f"llava_moslora {__version__}; trained with {versions}"),
    ]
    if not trained.text_only:
        rows[1:1] = [
            ("vision tower", f"`{model.vision_tower}`"),
            ("projector initialised from", f"`{model.pretrain_mm_mlp_adapter}`"),
            ("images", _images(trained)),
        ]
    if trained.bits == 4:
        rows.insert(
            -1, ("adapters merged into", MERGED_INTO[trained.merge_base] if "llm" in target.merged else "nothing")
        )
    return rows


def _loss(trained: TrainedRun) -> str:
    """First and last logged training loss, if the checkpoint contains the Trainer's log; without a validation loss also
    the lowest of a step."""
    file = trained.checkpoint / "trainer_state.json"
    if not file.is_file():
        return "not recorded in the checkpoint"
    try:
        log = parse_json(file.read_bytes(), finite=False)["log_history"]
        losses = [(int(row["step"]), float(row["loss"])) for row in log if "loss" in row]
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        fix = "export another checkpoint"
        raise Refusal("K-JSON", "not the Trainer's log", file=file, found=repr(error), fix=fix) from error
    if not losses:
        return "none logged"
    (first, first_loss), (last, last_loss) = losses[0], losses[-1]
    text = f"{first_loss:.4g} at step {first}, {last_loss:.4g} at step {last}"
    if "metrics" in trained.manifest:
        return text
    low, lowest = min(losses, key=lambda row: row[1])
    return f"{text}, lowest {lowest:.4g} at step {low}"


def proof_in_one_line(report: dict) -> str:
    """For the terminal."""
    if report["proof"] != "passed":
        return report["proof"]
    exact, *others = _findings(report)
    return "; ".join([f"passed: {exact}", *(f"as expected, {other}" for other in others)])


def _proof(report: dict) -> str:
    if report["proof"] != "passed":
        return f"None: {report['proof']}."
    checked = (
        f"Passed: a fresh process with stock libraries only, {report['questions']} questions, float32 arithmetic. "
        f"Compared: {', '.join(report['compared'])}."
    )
    return "\n".join([checked, *(f"{finding[0].upper()}{finding[1:]}." for finding in _findings(report))])


def _findings(report: dict) -> list[str]:
    """The differences between export and run, and those caused by rounding or the merge base."""
    largest = report["largest_value"]
    differences = ", ".join(
        f"{key} within {difference:.2g} of values up to {largest[key]:.3g}"
        for key, difference in report["largest_difference"].items()
    )
    findings = [f"the {report['exact']} is exact: stock libraries compute {differences}"]
    if (moved := report["logits_difference_from_the_run_as_trained"]) is not None:
        cause = report["cause_of_that_difference"]
        findings.append(f"{cause} alone moves logits by up to {moved:.2g} of {largest['logits']:.3g}")
    return findings
