"""The model card: an export's README.md, from what the run and the proof recorded."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch

from llava_moslora._version import __version__
from llava_moslora.export.trained_run import DEQUANTIZED, ORIGINAL, TrainedRun
from llava_moslora.models.towers import kind_of
from llava_moslora.text.templates import OWN

LOADS = {
    "hf": """from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(FOLDER, backend="pil")  # scales images as training did
model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="auto")
turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
image = Image.open("photo.jpg").convert("RGB")
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.dtype)
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))""",
    "llava": """from llava.model.builder import load_pretrained_model
tokenizer, model, image_processor, _ = load_pretrained_model(FOLDER, None, "llava-tuned")""",
    "llm": """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(FOLDER)""",
    "vision": """from transformers import CLASS
tower = CLASS.from_pretrained(FOLDER, dtype="auto")  # the features are hidden_states[-2][:, SKIPPED:]""",
    "projector": """from safetensors.torch import load_file
weights = load_file(FOLDER + "/model.safetensors")  # linear, GELU, linear; XTuner runs modeling_projector.py""",
    "xtuner": """from vlmeval.vlm import LLaVA_XTuner
model = LLaVA_XTuner(FOLDER, llm_path=None, visual_encoder_path=None, prompt_template=TEMPLATE)""",
    "xtuner_adapters": """from vlmeval.vlm import LLaVA_XTuner
model = LLaVA_XTuner(FOLDER, llm_path="LLM", visual_encoder_path="TOWER", prompt_template=TEMPLATE)""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM, CLASS
llm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("LLM"), FOLDER + "/llm_adapter")
tower = PeftModel.from_pretrained(CLASS.from_pretrained("TOWER"), FOLDER + "/vision_adapter")""",
    "peft with base": """from peft import PeftModel
from transformers import AutoModelForImageTextToText
base = AutoModelForImageTextToText.from_pretrained(FOLDER + "/base", dtype="auto")
model = PeftModel.from_pretrained(base, FOLDER + "/adapter")""",
}

XTUNER_TEMPLATES = {  # as XTuner's PROMPT_TEMPLATE calls ours; None: a question as it stands
    "chatml": "qwen_chat",
    "internlm2": "internlm2_chat",
    "llama2": "llama2_chat",
    "llama3": "llama3_chat",
    "plain": None,
    "vicuna": "vicuna",
    "vicuna_v1": "vicuna",
    OWN: None,
}


def write_card(trained: TrainedRun, kind: str, dtype: torch.dtype, report: dict, folder: Path) -> None:
    model, adapter = trained.record.model, trained.record.adapter
    rows = [
        ("LLM", f"`{model.model_name_or_path}`{', trained over NF4' if trained.bits == 4 else ''}"),
        ("vision tower", f"`{model.vision_tower}`"),
        ("projector began as", f"`{model.pretrain_mm_mlp_adapter}`"),
        ("prompt template", f"`{trained.template}`"),
        ("images", _images(trained)),
        ("checkpoint", f"`{trained.checkpoint.name}` of `{trained.run.name}`"),
        ("dtype", str(dtype).removeprefix("torch.")),
        ("written by", f"llava_moslora {__version__}; trained with {_versions(trained)}"),
    ]
    if trained.bits == 4:
        rows.insert(-1, ("adapters merged into", MERGED_INTO[trained.merge_base] if "peft" not in kind else "nothing"))
    if trained.adapter is None:
        rows.append(("trained", "the projector alone (stage 1)"))
    else:
        rows.append(("trained", f"projector; adapters LLM r {adapter.lora_r}, tower r {adapter.vision_lora_r}"))
    rows += _losses(trained)
    text = [
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [llava, moslora]\n---",
        f"# {folder.name.removeprefix('.').removesuffix('.staging')}",
        "A LLaVA tuned with MoSLoRA (mixture-of-subspaces LoRA), exported as "
        f"`{kind}`. What it was checked against is in `export_report.json`.",
        "```python\n" + _usage(trained, kind) + "\n```",
        "## Where it comes from",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]),
        f"The command: `{shlex.join(trained.record.command)}`",
        "Fingerprints (SHA-256 of a file, size in bytes of weights):",
        "```json\n" + json.dumps({k: trained.manifest[k] for k in ("llm", "vision_tower", "data")}, indent=1) + "\n```",
        "## Proof",
        _proof(report),
    ]
    (folder / "README.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def _images(trained: TrainedRun) -> str:
    if trained.pads:
        return "padded to a square"
    return "cropped" if trained.preprocessor["do_center_crop"] else "scaled to a square"


def _usage(trained: TrainedRun, kind: str) -> str:
    tower = kind_of(trained.vision_config)
    template = repr(XTUNER_TEMPLATES[trained.template])
    words = {"TEMPLATE": template, "CLASS": tower.model.__name__, "SKIPPED": str(tower.class_tokens)}
    text = 'FOLDER = "."  # where this page lies\n' + LOADS[kind]
    for word, value in words.items():
        text = text.replace(word, value)
    return text


MERGED_INTO = {
    ORIGINAL: "the original 16-bit weights",
    DEQUANTIZED: "the dequantised NF4 weights, which training saw",
}


def _versions(trained: TrainedRun) -> str:
    return ", ".join(f"{name} {version}" for name, version in trained.record.versions.items() if version)


def _losses(trained: TrainedRun) -> list[tuple[str, str]]:
    """First, last and lowest logged training loss, where the checkpoint holds the Trainer's log."""
    file = trained.checkpoint / "trainer_state.json"
    if not file.is_file():
        return [("loss", "not recorded in the checkpoint")]
    logged = [(row["step"], row["loss"]) for row in json.loads(file.read_text())["log_history"] if "loss" in row]
    if not logged:
        return [("loss", "none logged")]
    (first, began), (last, ended) = logged[0], logged[-1]
    low, lowest = min(logged, key=lambda row: row[1])
    return [("loss", f"{began:.4g} at step {first}, {ended:.4g} at step {last}, lowest {lowest:.4g} at step {low}")]


def summary(report: dict) -> str:
    """The report in one line."""
    if report["proof"] != "passed":
        return report["proof"]
    found = ", ".join(f"{key} within {value:.2g}" for key, value in report["largest_difference"].items())
    if (changed := report["logits_difference_from_the_run_as_trained"]) is not None:
        found += f"; logits differ by {changed:.2g} from the run as it was trained"
    return f"passed, {found}"


def _proof(report: dict) -> str:
    if report["proof"] != "passed":
        return f"None: {report['proof']}."
    lines = [
        f"Passed: a fresh process with stock libraries only, {report['questions']} questions, float32 arithmetic. "
        f"Compared: {', '.join(report['compared'])}."
    ]
    for key, difference in report["largest_difference"].items():
        largest = report["largest_value"][key]
        lines.append(f"Largest difference of {key}: {difference:.2g}, of values up to {largest:.3g}.")
    if (changed := report["logits_difference_from_the_run_as_trained"]) is not None:
        lines.append(f"Against the run as it was trained, before rounding and merging, logits differ by {changed:.2g}.")
    return "\n".join(lines)
