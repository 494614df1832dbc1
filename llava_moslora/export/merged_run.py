"""Computes the run's outputs for verification: as it was trained, and merged in memory.

PEFT merges it, so that the verification shares no code with the merge that it checks.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from llava_moslora.adapters.methods import METHODS
from llava_moslora.export import mapped_weights, probe
from llava_moslora.export.formats import DEQUANTIZED
from llava_moslora.export.target import ExportPlan, Target
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.inference.generate import Question, batch, first_logits, generate
from llava_moslora.inference.load import ChatModel, load_run
from llava_moslora.models.llava import Llava
from llava_moslora.models.names import adapter_tensor, part_of
from llava_moslora.models.towers import kind_of

MAX_NEW_TOKENS = 16

# Of one question: ids [T], logits of the last token [V], answer [new tokens], and with images features [N, P, E] and
# projected [N, P, D]; float32
RunAnswer = dict[str, Tensor]


def answers_of_run(
    trained: TrainedRun,
    target: Target,
    plan: ExportPlan,
    questions: list[Question],
    features: Tensor | None,
    dtype: torch.dtype,
    mapped: bool,
) -> tuple[list[RunAnswer], list[Tensor]]:
    """The run's outputs for each question after merging and rounding as in ``plan``, and its logits before that.

    Args:
        features: [1, P, E], the input for the projector, if the export contains nothing else.
        mapped: :func:`llava_moslora.export.mapped_weights.needed`.
    """
    chat_model = _load(trained, trained.bits, mapped)
    as_trained = [first_logits(chat_model, question) for question in questions]
    if another_llm := trained_over_another_llm(trained, target):
        del chat_model  # one model in memory at a time
        chat_model = _load(trained, 16, mapped)
    if target.merged and trained.adapter is not None:
        # PEFT cannot unload LoHa and LoKr next to modules_to_save, such as the projector: merged in place
        if "llm" not in target.merged or not (METHODS[trained.record.adapter.method].own_layer or mapped):
            _merge_parts(chat_model, target.merged)
        elif mapped:
            mapped_weights.merge_where_used(_base_model(chat_model), dtype)
        elif trained.bits == 4 and not another_llm:
            from llava_moslora.adapters.bnb import merge_over_4bit

            chat_model.model, _ = merge_over_4bit(chat_model.model)
        else:
            chat_model.model = chat_model.model.merge_and_unload()
    _round(chat_model, target, plan, dtype)
    return [_answer(chat_model, question, features) for question in questions], as_trained


def trained_over_another_llm(trained: TrainedRun, target: Target) -> bool:
    """Adapters trained over NF4 weights are exported over the original ones, unless merged into the former."""
    return trained.bits == 4 and not ("llm" in target.merged and trained.merge_base == DEQUANTIZED)


def _load(trained: TrainedRun, bits: int, mapped: bool) -> ChatModel:
    stored_dtype = trained.llm_config.dtype if mapped and bits == 16 else None
    chat_model = load_run(
        trained.run, checkpoint=trained.checkpoint, llm=trained.llm_folder, vision_tower=trained.vision_spec or None,
        bits=bits, llm_dtype=stored_dtype,
    )  # fmt: skip
    chat_model.model.to("cpu")  # 4-bit weights are on the GPU, if there is one: they are quantised there
    if stored_dtype is not None:
        model = _base_model(chat_model)
        for part in (model.model if trained.text_only else model.model.language_model, model.lm_head):
            probe.compute_in_float32(part)
    return chat_model


def _base_model(chat_model: ChatModel) -> Llava:
    model = chat_model.model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _merge_parts(chat_model: ChatModel, parts: Collection[str]) -> None:
    """Merge the adapters of ``parts`` in place; the others stay unmerged."""
    for name, module in chat_model.model.named_modules():
        if isinstance(module, BaseTunerLayer) and part_of(name) in parts:
            module.merge()


@torch.no_grad()
def _round(chat_model: ChatModel, target: Target, plan: ExportPlan, dtype: torch.dtype) -> None:
    """Round the parameters that the export stores in ``dtype``; adapters and a projector next to them are float32."""
    whole = "projector" in target.merged
    for name, parameter in chat_model.model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype == dtype:  # in NF4, or memory-mapped
            continue
        kept = adapter_tensor(name) or (not whole and "modules_to_save" in name)
        if part_of(name) in plan.rounded and not kept:
            parameter.data = parameter.data.to(dtype).float()


@torch.inference_mode()
def _answer(chat_model: ChatModel, question: Question, features: Tensor | None) -> RunAnswer:
    inputs, model = batch(chat_model, [question]), _base_model(chat_model)
    ids = inputs["input_ids"][0]
    answer = {"ids": ids, "logits": chat_model.model(**inputs).logits[0, -1].float()}
    answer["answer"] = generate(chat_model, inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, len(ids) :]
    if "pixel_values" in inputs:
        answer["features"] = _features(model, inputs["pixel_values"])
        answer["projected"] = model.model.multi_modal_projector(answer["features"])
    if features is not None:
        answer["projected"] = model.model.multi_modal_projector(features)
    return answer


def _features(model: Llava, pixels: Tensor) -> Tensor:
    """The projector's input [N, P, E]: the training model's last layer is the one before the complete tower's last."""
    layer, skipped = model.config.vision_feature_layer, kind_of(model.config.vision_config).class_tokens
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer][:, skipped:]
