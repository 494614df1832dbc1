"""The model card of an exported SDXL LoRA: its README.md, from the records of the run and of the verification."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from llava_moslora._version import __version__
from llava_moslora.diffusion.lora_file import KOHYA_FILE, LORA_FILE
from llava_moslora.export.card_data import license_copies, license_of, read_base
from llava_moslora.files.manifest import MANIFEST
from llava_moslora.runs.record import RunRecord


def write_card(
    folder: Path, record: RunRecord, manifest: dict[str, Any], base_folder: Path, report: dict[str, Any],
    files: list[str],
) -> None:  # fmt: skip
    """Write ``README.md``, and copies of the base model's licences, into the export in ``folder``."""
    data: Any = record.data
    adapter: Any = record.adapter
    base = read_base("base", str(base_folder))
    for source, copy in zip(base.license_files, license_copies(base), strict=True):
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / copy)
    plain = adapter.mixer_init == "identity" and not adapter.train_mixer
    method = "LoRA" if plain else f"MoSLoRA, mixers {adapter.mixer_init}"
    license_: dict[str, Any] = dict(license_of(base))
    front = ModelCardData(
        base_model=base.hub_id, base_model_relation="adapter" if base.hub_id else None, library_name="diffusers",
        pipeline_tag="text-to-image", instance_prompt=data.prompt,
        tags=["text-to-image", "stable-diffusion-xl", "stable-diffusion-xl-diffusers", "diffusers", "lora",
              *([] if plain else ["moslora"])], **license_,
    )  # fmt: skip
    parts = "UNet and both text encoders" if adapter.train_text_encoder else "UNet"
    pictures = sum(len(some) for some in manifest["pictures"].values())
    lines = [
        f"---\n{front.to_yaml()}\n---",
        f"# {folder.name.removeprefix('.').removesuffix('.staging')}",
        f"A subject that **{base.name}** was taught from {pictures} pictures, all with the prompt **{data.prompt}**. "
        f"A plain LoRA for its {parts}: trained as {method}, rank {adapter.lora_r}, alpha {adapter.lora_alpha:g}; the "
        "mixers are folded in, and the scaling is in `lora_B`, so that alpha is the rank.",
        "```python\nimport torch\nfrom diffusers import StableDiffusionXLPipeline\n"
        f'pipeline = StableDiffusionXLPipeline.from_pretrained("{base.hub_id or base.name}", '
        'dtype=torch.float16).to("cuda")  # before diffusers 0.42: torch_dtype\n'
        f'pipeline.load_lora_weights(".", weight_name="{LORA_FILE}")  # this folder, or its name on the Hub\n'
        f"pipeline({data.prompt!r}).images[0]\n```",
    ]
    if KOHYA_FILE in files:
        lines.append(f"`{KOHYA_FILE}` is the same with kohya's key names, for tools that need them.")
    lines += [
        f"Training: step {manifest['step']} of {manifest['of']}, {record.global_batch_size} pictures a step at "
        f"{data.resolution}×{data.resolution}, learning rate {record.training_value('learning_rate'):g}, seed "
        f"{manifest['seed']}; llava_moslora {__version__}.",
        f"```\n{shlex.join(record.command)}\n```",
        f"Verification: {report['proof']}"
        + (f"; largest differences {report['largest_difference']}" if "largest_difference" in report else "")
        + f". `export_report.json` has the details, `{MANIFEST}` the hash of every file.",
    ]
    (folder / "README.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
