"""Builds a plan's request from training flags or a run's run.json. Configurations are read, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava_moslora.adapters.methods import METHODS
from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings
from llava_moslora.errors import Refusal
from llava_moslora.models.llava_folder import name_parts
from llava_moslora.models.llm import check_llm_composes, read_llm_config
from llava_moslora.models.vision import read_vision_config
from llava_moslora.planning.plan import Request, device_of
from llava_moslora.planning.records import Records, assumed, of_dataset
from llava_moslora.planning.setting import Choice, Model, Zero
from llava_moslora.planning.states import ADAM_BYTES, STATE_BYTES
from llava_moslora.text.templates import recognise_template
from llava_moslora.text.tokenizer import load_tokenizer

# Flags that change what is saved between forward and backward in ways that the planner does not model
COMPILED = "torch.compile itself decides what is saved and what is recomputed"
NOT_COUNTED = {
    "torch_compile": COMPILED,
    "torch_compile_backend": COMPILED,
    "torch_compile_mode": COMPILED,
    "use_liger_kernel": "what Liger's kernels save is not modelled",
}


@dataclass(frozen=True)
class Asked:
    """Flags of the planner itself.

    Args:
        gpu: a name of ``devices.COMMAND_LINE``. gpus: N.
        records, tokens, images, labels: of the data set, and of a record, where the data are not prepared.
    """

    gpu: str
    gpus: int
    records: int | None = None
    tokens: int | None = None
    images: int | None = None
    labels: int | None = None

    def __post_init__(self) -> None:
        for name in ("gpus", "records", "tokens", "images", "labels"):
            value, smallest = getattr(self, name), 0 if name == "images" else 1
            if value is not None and value < smallest:
                raise Refusal("C-FLAG", "out of range", key=f"--{name}", found=value, expected=f"at least {smallest}")


def make_request(
    asked: Asked,
    model: ModelSettings,
    data: DataSettings,
    adapter: AdapterSettings,
    training: Mapping[str, Any],
    accumulation: int,
    deepspeed: dict[str, Any] | None,
    zeros: Mapping[str, dict[str, Any]],
) -> Request:
    """
    Args:
        training: values of the training flags by name.
        accumulation: micro-batches per step on ``asked.gpus`` ranks.
        deepspeed: the content of ``--deepspeed``.
        zeros: DeepSpeed files to choose from, by path, with their content.

    Raises:
        Refusal: C-FLAG, an unknown GPU or a number out of range; N-PLAN, a setting whose memory is not counted;
            C-MODEL, an LLM whose loss is not what is trained; whatever reading the configurations refuses.
    """
    check_counted(training, deepspeed)
    device_name = device_of(asked.gpu)
    model = name_parts(model)
    llm = read_llm_config(model.model_name_or_path)
    check_llm_composes(llm, model.model_name_or_path)
    tower = None if model.text_only else read_vision_config(model.tower)
    if tower is None:
        adapter = replace(adapter, vision_lora_r=0)
    bf16, fp16 = training.get("bf16"), training.get("fp16")
    dtype = torch.bfloat16 if bf16 else torch.float16 if fp16 else torch.float32
    zero = Zero.of(deepspeed)
    parts = Model(llm, tower, adapter, dtype, model.bits, model.attn_implementation, zero.stage == 3)
    file = training.get("deepspeed")
    recompute = training.get("recompute") or ("full" if training.get("gradient_checkpointing") else "none")
    choice = Choice(
        int(training["per_device_train_batch_size"]), accumulation, recompute, model.bits, zero,
        None if file is None else str(file),
    )  # fmt: skip
    optimizer = optimizer_of(training)
    return Request(
        model=parts,
        choice=choice,
        records=_records(asked, model, data, parts.image_tokens, training),
        device_name=device_name,
        gpus=asked.gpus,
        zeros=_zeros(choice, zeros, training, optimizer, adapter.method),
        state_bytes=STATE_BYTES[optimizer],
        epochs=float(training.get("num_train_epochs") or 1),
        max_steps=int(training.get("max_steps") or -1),
        workers=max(1, int(training.get("dataloader_num_workers") or 1)),
        image_engine=data.image_engine,
        save_steps=float(training.get("save_steps") or 500),
        save_total_limit=training.get("save_total_limit"),
    )


def check_counted(training: Mapping[str, Any], deepspeed: dict[str, Any] | None) -> None:
    """
    Raises:
        Refusal: N-PLAN, a setting whose memory is not modelled here.
    """
    for flag, why in NOT_COUNTED.items():
        if (found := str(training.get(flag))) not in ("None", "False"):
            raise _not_counted(why, f"--{flag}", found, f"plan without --{flag}")
    zero = (deepspeed or {}).get("zero_optimization", {})
    for block in ("offload_optimizer", "offload_param"):
        if zero.get(block, {}).get("device") == "nvme":
            why = "host memory used next to the disk is not modelled"
            key = f"--deepspeed {training.get('deepspeed')}: zero_optimization.{block}.device"
            raise _not_counted(why, key, "nvme", 'plan with "cpu", which needs more of the host')


def optimizer_of(training: Mapping[str, Any]) -> str:
    """``--optim``, by default the Trainer's."""
    given = training.get("optim") or "adamw_torch_fused"
    return str(getattr(given, "value", given))


def _not_counted(why: str, key: str, found: str, fix: str) -> Refusal:
    return Refusal("N-PLAN", f"not supported by the planner: {why}", key=key, found=found, fix=fix)


def _zeros(
    choice: Choice, files: Mapping[str, dict[str, Any]], training: Mapping[str, Any], optimizer: str, method: str
) -> tuple[tuple[str | None, Zero], ...]:
    """The DeepSpeed files that are compatible with the flags, that of the flags first."""
    own: tuple[tuple[str | None, Zero], ...] = ((choice.zero_file, choice.zero),)
    if choice.zero.stage is None or STATE_BYTES[optimizer] != ADAM_BYTES:  # some cannot be partitioned
        return own
    others = [(file, Zero.of(content)) for file, content in files.items()]
    adam = optimizer in ("adamw_torch", "adamw_torch_fused")  # the only ones that can be offloaded
    return own + tuple(
        (file, zero)
        for file, zero in others
        if zero != choice.zero
        and not (zero.stage == 0 and training.get("fp16"))
        and not (zero.stage == 3 and (training.get("sample_questions") or METHODS[method].not_under_zero3))
        and (adam or not zero.offload_optimizer)
    )


def _records(
    asked: Asked, model: ModelSettings, data: DataSettings, image_tokens: int, training: Mapping[str, Any]
) -> Records:
    """Of the prepared data where there are any and no flag says otherwise, else from flags and assumptions."""
    records, data_seed = None, training.get("data_seed")
    seed = int(training.get("seed", 42) if data_seed is None else data_seed)
    if asked.tokens is None and asked.labels is None:
        records = _prepared(model, data, image_tokens, packing=bool(training.get("packing")), seed=seed)
    if records is None:
        images = asked.images
        if images is None and data.image_folder is None and asked.tokens is not None:
            images = 0
        trained = round(asked.records * data.data_share) if asked.records else asked.records
        records = assumed(data.model_max_length, trained, asked.tokens, images, asked.labels, image_tokens)
    return records


def _prepared(
    model: ModelSettings, data: DataSettings, image_tokens: int, *, packing: bool, seed: int
) -> Records | None:  # fmt: skip
    if not (Path(data.data_cache).is_dir() and all(Path(path).is_file() for path in data.data_path)):
        return None
    # here: `datasets` takes a second to import
    from llava_moslora.data.prepare import find_prepared
    from llava_moslora.data.split import validation_data

    try:
        tokenizer = load_tokenizer(model.model_name_or_path, images=not model.text_only)
        template = model.version or recognise_template(tokenizer)
    except Refusal:  # a folder with only config.json: enough for a plan, but not for the cache key
        return None
    dataset = find_prepared(data, tokenizer=tokenizer, template=template, tokens_per_image=image_tokens)
    if dataset is None:
        return None
    rows, *_ = validation_data(dataset, replace(data, eval_data_path=[]), lambda _: dataset, seed=seed)
    return of_dataset(dataset, data, rows, vision=not model.text_only, packing=packing)
