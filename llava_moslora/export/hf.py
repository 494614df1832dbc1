"""The merged model as one ``LlavaForConditionalGeneration`` folder, in the on-disk layout that every reader knows.

Tensors carry the names of transformers 4.36–4.51 (``language_model.model.…``, ``vision_tower.vision_model.…``), which
later versions and vLLM rename on loading. Base tensors are read, merged and written one by one, so memory holds one
output shard whatever the model's size; names are made here, never taken from a live model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlavaConfig

from llava_moslora.adapters.fold import LowRank, merge
from llava_moslora.adapters.reading import read_adapter
from llava_moslora.data.conversation import stop_token_ids
from llava_moslora.data.tokenizer import image_token_id, load_tokenizer
from llava_moslora.errors import Refusal
from llava_moslora.export.processor import write_processor
from llava_moslora.inference.load import newest_checkpoint
from llava_moslora.models.assemble import HEAD, LLM, PROJECTOR, VISION, mean_row, tokens_per_picture
from llava_moslora.models.llm import read_llm_config, read_llm_tensors, with_old_rope
from llava_moslora.models.projector import read_projector
from llava_moslora.models.vision import load_vision_tower
from llava_moslora.runs.manifest import fsync, write_json
from llava_moslora.runs.record import TOKENIZER, read_run

SHARD_BYTES = 2 * 1024**3
# module in memory -> its name in the legacy layout
LEGACY = {
    LLM + ".": "language_model.model.",
    HEAD: "language_model.lm_head",
    VISION + ".": "vision_tower.vision_model.",
    PROJECTOR + ".": "multi_modal_projector.",
}
EMBEDDING, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@dataclass(frozen=True)
class Planned:
    """A tensor of the export: its name, its size when written, and how to get it merged."""

    name: str
    numel: int
    read: Callable[[], Tensor]


def legacy_name(module: str) -> str:
    """The legacy layout's name of an in-memory module or parameter name."""
    for prefix, legacy in LEGACY.items():
        if module.startswith(prefix):
            return legacy + module[len(prefix) :]
    raise AssertionError(f"no part of LLaVA: {module}")


def export_hf(
    run: str | Path, output: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """Write the newest valid checkpoint of ``run``, merged, to ``output``; the folder appears whole or not at all.

    Args:
        run: the ``--output_dir`` of a training.
        dtype: of the written weights; None: the dtype of the LLM folder.

    Raises:
        Refusal: no run, no valid checkpoint, ``output`` exists, a base folder is gone or does not fit.
    """
    run, output = Path(run), Path(output)
    settings = read_run(run)["settings"]
    if output.exists() and not overwrite:
        raise Refusal(
            "C-OUTPUT", "already exists", file=output, key="--output_dir", fix="choose another, or --overwrite"
        )
    checkpoint = newest_checkpoint(run)
    parts = settings["model"]
    llm_config = read_llm_config(parts["model_name_or_path"])
    dtype = dtype or llm_config.dtype or torch.float32
    tokenizer = load_tokenizer(run / TOKENIZER)
    template = parts["version"]

    vision, preprocessor = load_vision_tower(parts["vision_tower"], torch.float32)
    low_ranks, projector = _read_checkpoint(checkpoint, vision.config, llm_config)
    plan = [
        *_plan_llm(Path(parts["model_name_or_path"]), llm_config, len(tokenizer)),
        *_plan_state(vision.state_dict(), LEGACY[VISION + "."]),
        *_plan_state(projector, LEGACY[PROJECTOR + "."]),
    ]

    staging = output.with_name(f".{output.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _write_shards(staging, plan, low_ranks, dtype)
    _write_config(staging, _llava_config(llm_config, vision.config, tokenizer, dtype))
    stops = stop_token_ids(tokenizer, template)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(staging)
    write_processor(
        staging, tokenizer, template, preprocessor, vision.config, pad=settings["data"]["image_aspect_ratio"] == "pad"
    )
    write_json(
        staging / "export.json",
        {"run": str(run), "checkpoint": checkpoint.name, "base": parts, "merged": len(low_ranks)},
    )
    for file in staging.iterdir():
        fsync(file)
    if output.exists():  # overwrite: the old folder goes only when the new one is complete
        shutil.rmtree(output)
    os.rename(staging, output)
    fsync(output.parent)
    return output


def _read_checkpoint(checkpoint: Path, vision_config, llm_config):
    """Low-rank factors by legacy weight name, and the projector's four tensors, of a stage-1 or stage-2 checkpoint."""
    adapter = checkpoint / "adapter"
    if not adapter.is_dir():
        return {}, read_projector(checkpoint / "projector", vision_config.hidden_size, llm_config.hidden_size)
    trained = read_adapter(adapter)
    low_ranks = {legacy_name(module) + ".weight": layer for module, layer in trained.layers.items()}
    prefix = PROJECTOR + "."
    projector = {name.removeprefix(prefix): t for name, t in trained.others.items() if name.startswith(prefix)}
    if len(projector) != 4 or len(trained.others) != 4:
        raise Refusal(
            "K-ADAPTER", "not the projector beside the adapters", file=adapter, found=", ".join(sorted(trained.others)),
            expected=f"the four tensors of {PROJECTOR}",
        )  # fmt: skip
    return low_ranks, projector


def _plan_state(state: dict[str, Tensor], prefix: str) -> Iterator[Planned]:
    for name, tensor in state.items():
        yield Planned(prefix + name, tensor.numel(), lambda tensor=tensor: tensor)


def _plan_llm(folder: Path, config, vocabulary: int) -> Iterator[Planned]:
    """The LLM's tensors from its files, with rows for appended tokens, and a head of its own where it was tied."""
    tensors = {f"language_model.{name}": stored for name, stored in read_llm_tensors(folder, config).items()}
    tensors.setdefault(LM_HEAD, tensors[EMBEDDING])  # absent only where it is tied
    for name, stored in tensors.items():
        rows = max(vocabulary - config.vocab_size, 0) if name in (EMBEDDING, LM_HEAD) else 0
        numel = math.prod((stored.shape[0] + rows, *stored.shape[1:]))
        yield Planned(name, numel, lambda stored=stored, rows=rows: _with_rows(stored.read(), rows))


def _with_rows(tensor: Tensor, extra: int) -> Tensor:
    """``extra`` rows more, float32: a mean rounded to a 16-bit base would not be the row of a float32 model."""
    return torch.cat([tensor.float(), mean_row(tensor.float()).expand(extra, -1)]) if extra else tensor


def _write_shards(folder: Path, plan: list[Planned], low_ranks: dict[str, LowRank], dtype: torch.dtype) -> None:
    """Merge and write tensor by tensor: W + s·B·W_mixer·A in float32, rounded once to ``dtype``."""
    unmatched = set(low_ranks) - {planned.name for planned in plan}
    assert not unmatched, f"adapted modules that the base does not have: {sorted(unmatched)[:4]}"
    size = torch.empty((), dtype=dtype).element_size()
    shards: list[list[Planned]] = [[]]
    filled = 0
    for planned in plan:
        if shards[-1] and filled + planned.numel * size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(planned)
        filled += planned.numel * size
    weight_map: dict[str, str] = {}
    with tqdm(total=len(plan), unit="tensor", desc="merging", dynamic_ncols=True) as bar:
        for number, shard in enumerate(shards, start=1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for planned in shard:
                tensor = planned.read()
                if planned.name in low_ranks:
                    tensor = merge(tensor.float(), low_ranks[planned.name])
                tensors[planned.name] = tensor.to(dtype).contiguous()
                weight_map[planned.name] = file
                bar.update()
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(planned.numel for planned in plan) * size
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _write_config(folder: Path, config: LlavaConfig) -> None:
    """``config.json`` with the LLM's rotary settings in both spellings: older readers do not see the new one."""
    config.save_pretrained(folder)
    file = folder / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, raw | {"text_config": with_old_rope(raw["text_config"])})


def _llava_config(llm_config, vision_config, tokenizer, dtype: torch.dtype) -> LlavaConfig:
    """As llava-hf publishes it: the feature layer counted from the end, over a complete tower; the head untied."""
    llm_config.vocab_size = max(llm_config.vocab_size, len(tokenizer))
    llm_config.tie_word_embeddings = False
    # Each part's own dtype would outrank the whole's on loading, and round what was just merged in a wider one.
    llm_config.dtype = vision_config.dtype = dtype
    return LlavaConfig(
        text_config=llm_config,
        vision_config=vision_config,
        image_token_index=image_token_id(tokenizer),
        image_seq_length=tokens_per_picture(vision_config),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
        dtype=dtype,
    )
