"""A trained run, opened for export: its checkpoint and its base, with lazy tensors.

Every target takes its tensors from here and only renames them; names are those of the standalone LLM and vision
tower. The base must be the one that the adapters were trained on: names and shapes would also fit another model of the
same kind, and the merged model would run but be wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from llava_moslora.adapters.fold import LowRank, Update, fold_layers
from llava_moslora.adapters.load import read_adapter
from llava_moslora.adapters.methods import METHODS
from llava_moslora.errors import Refusal, few
from llava_moslora.export.formats import DEQUANTIZED, ORIGINAL
from llava_moslora.export.writer import PlannedTensor
from llava_moslora.files.disk import read_json
from llava_moslora.files.manifest import read_facts
from llava_moslora.files.tensors import LazyTensor
from llava_moslora.models.internlm2 import MODEL_TYPE as INTERNLM2
from llava_moslora.models.llm import HEAD_WEIGHT, llm_on_meta, mean_row, read_llm_config, read_llm_tensors
from llava_moslora.models.names import LLM, LLM_ALONE, LM_HEAD, PROJECTOR, VISION_TOWER, select_parts
from llava_moslora.models.projector import KEYS, read_projector
from llava_moslora.models.vision import read_vision_config, read_vision_tensors
from llava_moslora.runs.fingerprint import check_base
from llava_moslora.runs.record import TOKENIZER, RunRecord, read_run
from llava_moslora.text.templates import chat_template, stop_token_ids
from llava_moslora.text.tokenizer import load_tokenizer

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class TrainedRun:
    """A valid checkpoint of a run and the base it belongs to.

    Attributes:
        record: ``run.json``. manifest: the checkpoint's.
        vision: the tensors of the complete vision tower, lazy.
        adapter: by the names of the composed model, lazy; None after stage 1.
        projector: ``linear_1.weight`` [D, E], ``linear_1.bias``, ``linear_2.weight`` [D, D], ``linear_2.bias``.
        vision_spec, vision_config, vision, projector: for a text-only run "", None, and empty.
        merge_base: which weights the LLM's adapters are added to: the original ones, or NF4 quantised and dequantised.
    """

    run: Path
    checkpoint: Path
    record: RunRecord
    manifest: dict[str, Any]
    llm_folder: Path
    vision_spec: str
    llm_config: PreTrainedConfig
    vision_config: PreTrainedConfig
    vision: dict[str, LazyTensor]
    tokenizer: PreTrainedTokenizerFast
    adapter: Mapping[str, Update] | None
    projector: dict[str, Tensor]
    merge_base: str

    @property
    def text_only(self) -> bool:
        return self.record.model.text_only

    @property
    def template(self) -> str:
        return self.record.model.template

    @property
    def pads(self) -> bool:
        """Images are padded to a square, not cropped."""
        return self.record.data.image_aspect_ratio == "pad"

    @property
    def bits(self) -> int:
        return self.record.model.bits

    @property
    def is_internlm2(self) -> bool:
        """Whether the LLM's folder is an InternLM2, which is loaded as a Llama."""
        return read_json(self.llm_folder / "config.json").get("model_type") == INTERNLM2

    @property
    def vocabulary(self) -> int:
        """Rows of embedding and head in the trained model."""
        return max(self.llm_config.vocab_size, len(self.tokenizer))

    def updates(self, *parts: str) -> dict[str, Update]:
        """The adapters of ``parts`` (:data:`llava_moslora.models.names.PARTS`), by module name in the part's own model:
        ``model.layers.0.mlp.up_proj``."""
        return select_parts(self.adapter or {}, parts)

    def loras(self, *parts: str) -> dict[str, LowRank]:
        """As :meth:`updates`, folded to plain LoRAs over the original base: its LM head lacks the appended tokens."""
        layers = fold_layers(self.updates(*parts))
        if head := layers.get(LM_HEAD):
            rows = self.llm_config.vocab_size
            layers[LM_HEAD] = replace(head, b=head.b.then(lambda b: b[:rows], shape=(rows, head.rank)))
        return layers

    def peft_updates(self, *parts: str) -> Mapping[str, Update]:
        """What stock PEFT can load over the original base: :meth:`loras`, or PEFT's own methods unchanged.

        Raises:
            Refusal: C-FORMAT, such a method on an LM head with rows for appended tokens.
        """
        if METHODS[self.record.adapter.method].own_layer:
            return self.loras(*parts)
        updates = self.updates(*parts)
        if LM_HEAD in updates and self.vocabulary > self.llm_config.vocab_size:
            raise Refusal(
                "C-FORMAT", "the adapter of the LM head has rows for appended tokens, the original head has not",
                file=self.run, key="--format peft", fix="--format hf",
            )  # fmt: skip
        return updates

    def llm_tensors(self, *, merged: bool = True) -> list[PlannedTensor]:
        """The LLM's tensors, with rows for appended tokens, and a separate head if it was tied.

        Args:
            merged: with the adapters and over :attr:`merge_base`; False: the original weights.
        """
        stored = read_llm_tensors(self.llm_folder, self.llm_config)
        stored.setdefault(HEAD_WEIGHT, stored[EMBEDDING])  # absent only if it is tied
        updates = self.updates("llm", "lm_head") if merged else {}
        quantised = set()
        if merged and self.bits == 4 and self.merge_base == DEQUANTIZED:
            sketch = llm_on_meta(self.llm_config, self.llm_folder)
            linears = {n for n, module in sketch.named_modules() if isinstance(module, nn.Linear) and n != LM_HEAD}
            quantised = {f"{name}.weight" for name in linears}
        for name, tensor in stored.items():
            extra = self.vocabulary - self.llm_config.vocab_size if name in (EMBEDDING, HEAD_WEIGHT) else 0
            if name in quantised:
                stored[name] = tensor.then(_quantise_and_dequantise)
            elif extra:
                shape = (tensor.shape[0] + extra, *tensor.shape[1:])
                stored[name] = tensor.then(partial(_extend, extra=extra), shape)
        return _plan(stored, updates, self.checkpoint)

    def vision_tensors(self, *, merged: bool = True) -> list[PlannedTensor]:
        """The complete tower's tensors under transformers 5's names (``encoder.layers.…``)."""
        updates = self.updates("vision_tower") if merged else {}
        return _plan(self.vision, updates, self.checkpoint)

    def exported_llm_config(self, dtype: torch.dtype) -> PreTrainedConfig:
        """With rows for appended tokens, and an untied head."""
        config = copy.deepcopy(self.llm_config)
        config.vocab_size = self.vocabulary
        config.tie_word_embeddings = False
        # A part's dtype takes precedence over the model's on loading, and would round weights merged in a wider one.
        config.dtype = dtype
        return config

    def exported_vision_config(self, dtype: torch.dtype) -> PreTrainedConfig:
        config = copy.deepcopy(self.vision_config)
        config.dtype = dtype
        return config

    def tokenizer_with_template(self) -> PreTrainedTokenizerFast:
        """The run's tokenizer with the prompt template of the training as its ``chat_template``."""
        self.tokenizer.chat_template = chat_template(self.template, self.tokenizer)
        return self.tokenizer

    def generation_config(self) -> GenerationConfig:
        """With the stop tokens of the training."""
        return GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=stop_token_ids(self.tokenizer, self.template),
            pad_token_id=self.tokenizer.pad_token_id,
        )


def _extend(weight: Tensor, extra: int) -> Tensor:
    """``extra`` rows for appended tokens, float32: a mean rounded to a 16-bit base would not be a float32 model's."""
    weight = weight.float()
    return torch.cat([weight, mean_row(weight).expand(extra, -1)])


def _quantise_and_dequantise(weight: Tensor) -> Tensor:
    """A weight as training over NF4 used it: quantised as on loading, then dequantised to float32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight.float(), blocksize=64, compress_statistics=True, quant_type="nf4"))


def open_trained(
    run: str | Path,
    checkpoint: Path,
    *,
    llm: str | Path | None = None,
    vision_tower: str | None = None,
    merge_base: str = ORIGINAL,
) -> TrainedRun:
    """Open ``checkpoint`` of ``run``, a training's ``--output_dir``.

    Args:
        checkpoint: whose files were verified.
        llm, vision_tower: the current paths of the base models, if they were moved.
        merge_base: for a run over a 4-bit LLM, :data:`ORIGINAL` or :data:`DEQUANTIZED`.

    Raises:
        Refusal: no run; a base that is missing, damaged, quantised, changed or a different one; no projector.
    """
    run = Path(run)
    record = read_run(run)
    if merge_base == DEQUANTIZED and record.model.bits != 4:
        raise Refusal(
            "C-FLAG", "the LLM of this run was not quantised", file=run, key="--merge_base", found=merge_base,
            expected=ORIGINAL, fix="omit the flag",
        )  # fmt: skip
    row = METHODS[record.adapter.method]
    if merge_base == DEQUANTIZED and not row.own_layer:
        raise Refusal(
            "C-FLAG", f"{row.title} can only be merged into the original weights", file=run, key="--merge_base",
            found=merge_base, expected=ORIGINAL, fix="omit the flag",
        )  # fmt: skip
    base = record.located.model
    text_only, llm_folder = base.text_only, Path(llm or base.model_name_or_path)
    if text_only and vision_tower:
        raise Refusal("C-FLAG", "the run has no vision tower", file=run, key="--vision_tower", fix="omit it")
    spec = "" if text_only else str(vision_tower or base.vision_tower)
    llm_config = read_llm_config(llm_folder)
    check_base(llm_folder, checkpoint, "llm", "--model_name_or_path")
    vision_config: PreTrainedConfig | None = None
    vision: dict[str, LazyTensor] = {}
    if not text_only:
        vision_config = read_vision_config(spec)
        vision = read_vision_tensors(spec, vision_config)
        check_base(spec, checkpoint, "vision_tower", "--vision_tower")
    vision_width = None if vision_config is None else vision_config.hidden_size
    adapter, projector = _read_checkpoint(checkpoint, vision_width, llm_config.hidden_size)
    tokenizer = load_tokenizer(run / TOKENIZER, images=not text_only)
    return TrainedRun(
        run=run, checkpoint=checkpoint, record=record, manifest=read_facts(checkpoint), llm_folder=llm_folder,
        vision_spec=spec, llm_config=llm_config, vision_config=vision_config, vision=vision,
        tokenizer=tokenizer, adapter=adapter, projector=projector, merge_base=merge_base,
    )  # fmt: skip


def _plan(tensors: dict[str, LazyTensor], updates: dict[str, Update], checkpoint: Path) -> list[PlannedTensor]:
    """``tensors``, each with the adapter of its module.

    Raises:
        Refusal: K-ADAPTER, an adapter of a layer that the base does not have, or has with a different shape.
    """
    updates = {f"{module}.weight": update for module, update in updates.items()}
    for name, update in updates.items():
        found = tensors[name].shape if name in tensors else None
        if found != update.shape:
            raise Refusal(
                "K-ADAPTER", "the adapter does not fit the base", file=checkpoint, key=name,
                found=found or "no such layer", expected=update.shape, fix="give the base it was trained on",
            )  # fmt: skip
    return [PlannedTensor(name, tensor, updates.get(name)) for name, tensor in tensors.items()]


def _read_checkpoint(
    checkpoint: Path, vision_width: int | None, llm_width: int
) -> tuple[Mapping[str, Update] | None, dict[str, Tensor]]:
    """The adapter (lazy) and the projector's four tensors of a stage-1 or stage-2 checkpoint.

    Args:
        vision_width: None: of a run on text alone, which has no projector.
    """
    folder = checkpoint / "adapter"
    if not folder.is_dir() and vision_width is not None:
        return None, read_projector(checkpoint / "projector", vision_width, llm_width)
    adapter = read_adapter(folder)  # checks every name and shape
    expected = set() if vision_width is None else {f"{PROJECTOR}.{key}" for key in KEYS}
    if adapter.others.keys() != expected:
        raise Refusal(
            "K-ADAPTER", "not the projector next to the adapters", file=folder,
            found=few(sorted(adapter.others), 8) or "none",
            expected=f"the four tensors of {PROJECTOR}" if expected else "none", fix="use another checkpoint",
        )  # fmt: skip
    parts = (LLM, VISION_TOWER, LM_HEAD) if expected else (LLM_ALONE, LM_HEAD)
    adapted = tuple(f"{module}." for module in parts)
    if foreign := [name for name in adapter.layers if not f"{name}.".startswith(adapted)]:
        what, fix = "adapters outside the LLM and the vision tower", "use another checkpoint"
        raise Refusal("K-ADAPTER", what, file=folder, found=few(foreign), fix=fix)
    projector = select_parts(adapter.others, ["projector"])
    return dict(adapter.layers), {name: tensor.read().clone() for name, tensor in projector.items()}
