"""``data/report.json`` of a run: its pictures, and the crop of each."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llava_moslora.diffusion.subjects import Picture
from llava_moslora.files.disk import write_json
from llava_moslora.sdxl_settings import SubjectSettings


def write_report(folder: Path, sets: dict[str, list[Picture]], encoded: dict[str, Tensor], data: SubjectSettings):
    """Write the report.

    Args:
        sets, encoded: as of :func:`llava_moslora.diffusion.encode.encode_once`.
    """
    folder.mkdir()
    rows: dict[str, list[dict]] = {}
    for name, pictures in sets.items():
        rows[name] = []
        for picture, ids in zip(pictures, encoded[f"{name}.time_ids"].tolist(), strict=True):
            height, width, top, left, size, _ = map(int, ids)
            rows[name].append({
                "name": picture.name, "sha256": picture.content, "size": [width, height], "crop_left_top": [left, top],
                "enlarged": min(width, height) < size,
            })  # fmt: skip
    write_json(folder / "report.json", {"prompt": data.prompt, "class_prompt": data.class_prompt, "pictures": rows})
