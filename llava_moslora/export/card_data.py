"""The front matter of a model card: base models, license, data sets, scores; nothing is guessed.

A model's name on the Hub is taken from its folder in the cache of ``huggingface_hub``, or from ``_name_or_path`` in
its configuration; its license from its README. Unknown values are omitted, and a comment says what to fill in:
a wrong name would link to an unrelated model. The Hub does not accept names of local files or folders there either.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llava_moslora.data.sources.saved_dataset import HUB
from llava_moslora.errors import Refusal
from llava_moslora.export.target import Target
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.files.disk import read_json
from llava_moslora.files.manifest import MANIFEST, sha256
from llava_moslora.models.open_clip import PREFIX as OPEN_CLIP

# Formats of a single part → the part, and its task on the Hub; all others are image-text-to-text.
ONE_PART = {"llm": ("llm", "text-generation"), "vision": ("vision tower", "image-feature-extraction")}
PROJECTOR = "projector"  # of no task by itself
IN_CACHE = re.compile(r"/models--([^/]+?)--([^/]+)/snapshots/")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LICENSE_FILES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.\w+)?", re.IGNORECASE)
RESULTS = "results.json"


@dataclass(frozen=True)
class Base:
    """A base model of the export.

    Attributes:
        part: ``llm`` or ``vision tower``. folder: its path; a tower that open_clip downloads has none.
        hub_id: its name on the Hub. certain: from the Hub's cache, and not only from a configuration, which may name
            the model that this one was tuned from.
        license: as the Hub abbreviates it, with ``license_name`` and ``license_link`` where that is ``other``.
    """

    part: str
    name: str
    folder: Path | None
    hub_id: str | None = None
    certain: bool = False
    license: dict[str, str] | None = None

    @property
    def license_files(self) -> list[Path]:
        if self.folder is None:
            return []
        return sorted(p for p in self.folder.iterdir() if p.is_file() and LICENSE_FILES.fullmatch(p.name))


def base_models(trained: TrainedRun, target: Target) -> list[Base]:
    """The LLM and the vision tower, or the one of them that the target consists of."""
    places = {"llm": str(trained.llm_folder), "vision tower": trained.vision_spec}
    if trained.text_only:
        del places["vision tower"]
    elif target.name in ONE_PART:
        part = ONE_PART[target.name][0]
        places = {part: places[part]}
    return [read_base(part, place) for part, place in places.items()]


def read_base(part: str, place: str) -> Base:
    """Name and license of a base model from its folder.

    Args:
        place: a folder, or an open_clip name (:mod:`llava_moslora.models.open_clip`).
    """
    if place.startswith(OPEN_CLIP):
        arch, at, where = place.removeprefix(OPEN_CLIP).partition("@")
        folder = Path(where or arch)
        name = f"{arch} of open_clip" if at else folder.name
    else:
        folder = Path(place)
        name = folder.resolve().name
    if folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        return Base(part, name, None)
    hub_id, certain = None, False
    if found := IN_CACHE.search(f"{folder.absolute()}/") or IN_CACHE.search(f"{folder.resolve()}/"):
        hub_id, certain = "/".join(found.groups()), True
    elif (file := folder / "config.json").is_file():
        said = read_json(file).get("_name_or_path")
        if isinstance(said, str) and HUB_ID.fullmatch(said) and not Path(said).exists():
            hub_id = said
    return Base(part, hub_id or name, folder, hub_id, certain, _license(folder))


def _license(folder: Path) -> dict[str, str] | None:
    """``license`` of the front matter of the folder's README, with what belongs to it; None: there is none."""
    file = folder / "README.md"
    if not file.is_file():
        return None
    try:
        data = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception:  # errors of the YAML parser, huggingface_hub and the decoder: a README without information
        return None
    found = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    known = {key: value for key, value in found.items() if isinstance(value, str) and value}
    return known if "license" in known else None


def license_of(base: Base) -> dict[str, str]:
    """``license`` of an export, with name and link: those of its base."""
    if base.license is None:
        if not base.license_files:
            return {"license": "other"}
        name = re.sub(r"[^a-z0-9.-]+", "-", base.name.lower()).strip("-")
        return {"license": "other", "license_name": f"{name}-license", "license_link": license_copies(base)[0]}
    link = base.license.get("license_link", "")
    if not link or "://" in link:
        return base.license
    if link in (copies := {Path(copy).name: copy for copy in license_copies(base)}):
        return base.license | {"license_link": copies[link]}
    return {key: value for key, value in base.license.items() if key != "license_link"}  # a relative link


def license_copies(base: Base) -> list[str]:
    """Where the export has its copies of :attr:`Base.license_files`."""
    return [f"licenses/{base.part.replace(' ', '_')}/{file.name}" for file in base.license_files]


def front_matter(
    trained: TrainedRun, target: Target, name: str, bases: list[Base], scores: dict[str, Any] | None
) -> str:
    """The YAML between the two lines ``---``, which are not part of it.

    Args:
        name: of the model, in ``model-index``. bases: of :func:`base_models`; the first one's license counts.
        scores: of :func:`read_scores`.
    """
    adapter = "llm" not in target.merged or target.name == PROJECTOR
    ids = list(dict.fromkeys(base.hub_id for base in bases if base.hub_id))
    paths = trained.record.data.data_path
    sets = [re.split("[@:]", path.removeprefix(HUB))[0] for path in paths if path.startswith(HUB)]
    sets = ["/".join(one.split("/")[:2]) for one in sets]
    tags = [
        *([] if trained.text_only else ["llava"]),
        *([method_name(trained)] if trained.adapter else []),
    ]
    task = None if target.name == PROJECTOR else ONE_PART.get(target.name, ("", "image-text-to-text"))[1]
    if trained.text_only:
        task = "text-generation"
    data = ModelCardData(
        base_model=ids or None,
        base_model_relation=("adapter" if adapter else "finetune") if ids else None,
        datasets=list(dict.fromkeys(sets)) or None,
        library_name="transformers" if "llm" in target.merged else "peft",
        pipeline_tag=task,
        tags=tags,
        model_name=name,
        eval_results=evaluation_results(scores) or None,
        **license_of(bases[0]),  # type: ignore[arg-type]
    )
    if data.eval_results is None:
        data.pop("model_name")
    comments = [
        f"# base_model: _name_or_path in the {base.part}'s config.json says {base.hub_id}" if base.hub_id else
        f"# base_model: add the name on the Hub of the {base.part}, here a folder {json.dumps(base.name)}"
        for base in bases
        if not base.certain
    ]  # fmt: skip
    if bases[0].license is None:
        comments.append(f"# license: that of the {bases[0].part} is not known here: see the section License")
    return "\n".join([data.to_yaml(), *comments])


def uses_mixers(trained: TrainedRun) -> bool:
    """Whether an adapter of the run has a mixer, unlike a plain LoRA."""
    towers = (trained.record.adapter.llm, trained.record.adapter.vision)
    mixers = [tower.train_mixer or tower.mixer_init != "identity" for tower in towers if tower]
    return trained.adapter is not None and trained.record.adapter.method == "moslora" and any(mixers)


def method_name(trained: TrainedRun) -> str:
    """The ``--method`` of a run with adapters; ``lora`` where mixers are frozen identities."""
    method = trained.record.adapter.method
    return "lora" if method == "moslora" and not uses_mixers(trained) else method


def read_scores(output: str | Path, trained: TrainedRun) -> dict[str, Any]:
    """``results.json`` of an evaluation of this checkpoint or of an export of it.

    Args:
        output: the ``--output`` of ``scripts/evaluate.py``, or its ``results.json``.

    Raises:
        Refusal: C-PATH, no such file; C-COMPARE, of another model; K-JSON, damaged.
    """
    file = Path(output)
    file = file / RESULTS if file.is_dir() else file
    if not file.is_file():
        expected = f"a folder with {RESULTS}"
        raise Refusal("C-PATH", "no results", file=output, key="--evaluation", expected=expected)
    content = read_json(file)
    try:
        headers = [dict(one["header"]) for one in content["benchmarks"].values()]
        evaluation_results(content)
        asked = [(header["model"], header["checkpoint"], header.get("export_of")) for header in headers]
        source = content["source"]
        for needed in ("llava_moslora", "conditions"):
            content[needed]
        for one in content["benchmarks"].values():
            one["interval"], one["remarks"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refusal("K-JSON", "not the results of an evaluation", file=file, found=repr(error)) from error
    ours = sha256(trained.checkpoint / MANIFEST)
    for model, checkpoint, export_of in asked:
        if not checkpoint and not export_of:
            raise Refusal(
                "C-COMPARE", "results of a model that did not record which checkpoint it was exported from", file=file,
                key="--evaluation", found=f"{source}: an export or answers from before 2026-11-27, or another tool's",
                fix=f"evaluate again into a new --output: {trained.run} itself, or a new export of it",
            )  # fmt: skip
        if ours != (model if checkpoint else export_of):
            raise Refusal(
                "C-COMPARE", "results of another model", file=file, key="--evaluation",
                found=f"{source}, {checkpoint or 'an export'}", expected=f"{trained.run}, {trained.checkpoint.name}",
                fix="evaluate this checkpoint, or omit --evaluation",
            )  # fmt: skip
    return content


def evaluation_results(scores: dict[str, Any] | None) -> list[EvalResult]:
    """A score per benchmark for ``model-index``, of those that have one."""
    return [
        EvalResult(
            task_type="image-text-to-text",
            task_name="Image-text-to-text",
            dataset_type=one.get("file", name),
            dataset_name=one.get("title", name),
            metric_type=one.get("metric", "score"),
            metric_name="score in percent",
            metric_value=round(float(one["score"]), 2),
            metric_args={"answers": one["answers"], "rules": one["rules"]},
        )
        for name, one in (scores or {}).get("benchmarks", {}).items()
        if one["score"] is not None
    ]
