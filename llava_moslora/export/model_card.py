"""The model card: an export's README.md, from what the run and the proof recorded."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch

from llava_moslora._version import __version__
from llava_moslora.export.formats import DEQUANTIZED, ORIGINAL
from llava_moslora.export.target import Target
from llava_moslora.export.targets.vllm import max_lora_rank
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.models.towers import kind_of
from llava_moslora.text.templates import TOKENIZER_TEMPLATE

XTUNER_TEMPLATES = {  # our templates' names in XTuner's PROMPT_TEMPLATE; None: questions are not wrapped in a template
    "chatml": "qwen_chat",
    "internlm2": "internlm2_chat",
    "llama2": "llama2_chat",
    "llama3": "llama3_chat",
    "plain": None,
    "vicuna": "vicuna",
    "vicuna_v1": "vicuna",
    TOKENIZER_TEMPLATE: None,
}
MERGED_INTO = {
    ORIGINAL: "the original 16-bit weights",
    DEQUANTIZED: "the dequantised NF4 weights, which training saw",
}


def write_card(trained: TrainedRun, target: Target, dtype: torch.dtype, report: dict, folder: Path) -> None:
    fingerprints = {key: trained.manifest[key] for key in ("llm", "vision_tower", "data")}
    text = [
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [llava, moslora]\n---",
        f"# {folder.name.removeprefix('.').removesuffix('.staging')}",
        "A LLaVA tuned with MoSLoRA (mixture-of-subspaces LoRA), exported as "
        f"`{target.name}`: {target.summary}. What it was checked against is in `export_report.json`.",
        f"```python\n{_usage(trained, target)}\n```",
        "## Where it comes from",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _rows(trained, target, dtype))]),
        f"The command: `{shlex.join(trained.record.command)}`",
        "Fingerprints (SHA-256 of a file, size in bytes of weights):",
        f"```json\n{json.dumps(fingerprints, indent=1)}\n```",
        "## Proof",
        _proof(report),
    ]
    (folder / "README.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def _usage(trained: TrainedRun, target: Target) -> str:
    """The target's Python with its placeholders filled in."""
    tower = kind_of(trained.vision_config)
    text = 'FOLDER = "."  # the folder of this page\n' + target.usage
    text = text.replace("TEMPLATE", repr(XTUNER_TEMPLATES[trained.template]))
    if "MAX_LORA_RANK" in text:
        text = text.replace("MAX_LORA_RANK", str(max_lora_rank(trained.record.adapter.lora_r)))
    return text.replace("VISION_CLASS", tower.model.__name__).replace("CLASS_TOKENS", str(tower.class_tokens))


def _rows(trained: TrainedRun, target: Target, dtype: torch.dtype) -> list[tuple[str, str]]:
    model, adapter = trained.record.model, trained.record.adapter
    crops = trained.record.preprocessor["do_center_crop"]
    versions = ", ".join(f"{name} {version}" for name, version in trained.record.versions.items() if version)
    rows = [
        ("LLM", f"`{model.model_name_or_path}`{', trained over NF4' if trained.bits == 4 else ''}"),
        ("vision tower", f"`{model.vision_tower}`"),
        ("projector began as", f"`{model.pretrain_mm_mlp_adapter}`"),
        ("prompt template", f"`{trained.template}`"),
        ("images", "padded to a square" if trained.pads else "cropped" if crops else "scaled to a square"),
        ("checkpoint", f"`{trained.checkpoint.name}` of `{trained.run.name}`"),
        ("dtype", str(dtype).removeprefix("torch.")),
        ("written by", f"llava_moslora {__version__}; trained with {versions}"),
    ]
    if trained.bits == 4:
        rows.insert(
            -1, ("adapters merged into", MERGED_INTO[trained.merge_base] if "llm" in target.merged else "nothing")
        )
    if trained.adapter is None:
        rows.append(("trained", "the projector alone (stage 1)"))
    else:
        rows.append(("trained", f"projector; adapters LLM r {adapter.lora_r}, tower r {adapter.vision_lora_r}"))
    return [*rows, ("loss", _loss(trained))]


def _loss(trained: TrainedRun) -> str:
    """First, last and lowest logged training loss, where the checkpoint holds the Trainer's log."""
    file = trained.checkpoint / "trainer_state.json"
    if not file.is_file():
        return "not recorded in the checkpoint"
    log = json.loads(file.read_text(encoding="utf-8"))["log_history"]
    losses = [(row["step"], row["loss"]) for row in log if "loss" in row]
    if not losses:
        return "none logged"
    (first, first_loss), (last, last_loss) = losses[0], losses[-1]
    low, lowest = min(losses, key=lambda row: row[1])
    return f"{first_loss:.4g} at step {first}, {last_loss:.4g} at step {last}, lowest {lowest:.4g} at step {low}"


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
    """The differences between export and run, and those that rounding or the choice of merge base cause."""
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
