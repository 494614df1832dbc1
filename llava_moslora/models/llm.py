"""LLMs: a folder → a transformers causal LM, or its tensors under that LM's names.

The folder is one of transformers, InternLM2 (read as Llama: :mod:`llava_moslora.models.internlm2`) or a complete LLaVA
(:mod:`llava_moslora.models.llava_folder`). Names and shapes are compared with the architecture. The weights are then
passed to ``from_pretrained`` as memory-mapped tensors, whatever the folder, because DeepSpeed's ZeRO-3 partitions and
bitsandbytes quantises there. Training and export read the same tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from llava_moslora.errors import Refusal
from llava_moslora.files.disk import read_json
from llava_moslora.files.json import LARGEST_CONFIG
from llava_moslora.files.tensors import LazyTensor, check_tensors, read_tensor_folder
from llava_moslora.models import internlm2, llava_folder
from llava_moslora.models.config_file import read_model_config

HEAD_WEIGHT = "lm_head.weight"
RUN = "run.json"  # of a run's folder: runs/record.py
# Fields with which architectures of transformers scale or cap their logits: named where the check finds a difference.
LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "dim_model_base")


def read_llm_config(folder: str | Path) -> PreTrainedConfig:
    """The LLM's configuration: for an InternLM2 folder a ``LlamaConfig``, for a complete LLaVA that of its LLM.

    What is to be trained is checked by :func:`check_llm_composes` too; what was trained is read without it.

    Raises:
        Refusal: C-PATH, no such folder; C-MODEL, it needs custom code, is quantised, or has an architecture that
            ``LlavaForConditionalGeneration`` cannot contain; K-JSON, K-CONFIG.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        run = folder.parent if folder.is_dir() and folder.name.startswith("checkpoint-") else folder
        if (run / RUN).is_file():
            raise Refusal(
                "C-PATH", "a run, and no LLM", file=folder, key="--model_name_or_path", expected="a model's folder",
                fix=f"--output_dir {run} --resume True continues it; scripts/export.py {run} makes a model of it",
            )  # fmt: skip
        raise Refusal(
            "C-PATH", "no LLM here" if folder.is_dir() else "no such folder", file=folder, key="--model_name_or_path",
            expected="a downloaded folder with config.json, tokenizer and weights",
            fix="check the path, or download the model first: nothing is fetched at run time",
        )  # fmt: skip
    raw = read_model_config(file)
    _generation_config(folder)
    if raw.get("quantization_config") is not None:
        raise Refusal(
            "C-MODEL", "the base is already quantised, and merging into it would not be exact", file=file,
            key="quantization_config", fix="give the 16-bit folder; --bits 4 quantises it while loading",
        )  # fmt: skip
    if raw.get("model_type") == internlm2.MODEL_TYPE:
        return internlm2.llama_config(raw, file)
    if llava_folder.is_llava(raw):
        return llava_folder.llm_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises several exception types for invalid fields
        raise Refusal(
            "C-MODEL", "not a configuration that transformers supports", file=file, found=error,
            fix="give an LLM of an architecture that transformers has itself: code in a model's folder is never run",
        ) from error  # fmt: skip
    model_class = _model_class(config, file)
    asked = (raw.get("architectures") or [model_class.__name__])[0]
    if "auto_map" in raw and asked != model_class.__name__:
        raise Refusal(
            "C-MODEL", "the folder needs custom code, which is never run", file=file, key="auto_map",
            found=asked, expected=model_class.__name__, fix="give an LLM of an architecture that transformers has",
        )  # fmt: skip
    return config


def longest_text(config: PreTrainedConfig) -> int | None:
    """The LLM's maximum context length in tokens, ``None`` if its configuration does not say.

    ``max_position_embeddings``, or more where positions are scaled and the configuration states the length before
    scaling, as Vicuna-16k's and Qwen2.5's with YaRN do; LLaMA-3.1's states the length after it.
    """
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor")
    if not isinstance(limit, int) or not isinstance(factor, int | float) or rope.get("rope_type") == "default":
        return limit if isinstance(limit, int) else None
    original = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(min(factor, 1e6) * original)) if isinstance(original, int) else limit


def _model_class(config: PreTrainedConfig, file: Path) -> type[PreTrainedModel]:
    """The causal LM class of ``config``; it must have the two parts that LLaVA contains, ``model`` and ``lm_head``."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None or found.base_model_prefix != "model":
        raise Refusal(
            "C-MODEL", "not a language model that LlavaForConditionalGeneration can contain", file=file,
            key="model_type", found=config.model_type, expected="llama, internlm2, mistral, qwen2, qwen3 or similar",
            fix="check --model_name_or_path",
        )  # fmt: skip
    return found


class _Given(BaseModelOutputWithPast):
    """A decoder's output of which only the hidden states are there; what a class has besides (routers, …) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def check_llm_composes(config: PreTrainedConfig, folder: str | Path) -> None:
    """Refuse to train an LLM that does more with tokens than embed them, or more with hidden states than ``lm_head``.

    Training computes its loss, and a LLaVA its logits, from ``lm_head(model(inputs_embeds))``. Gemma 2 caps its logits,
    Cohere, Granite and MiniCPM3 scale them, and Gemma 3n looks tokens up in a second table: such a model would be
    trained on another loss than that of the model it is used as.

    Args:
        config: :func:`read_llm_config` of the same folder.

    Raises:
        Refusal: C-MODEL.
    """
    # Whatever is drawn here is not taken from what --seed draws afterwards, such as a new projector.
    with torch.random.fork_rng(devices=[]):
        llm = llm_on_meta(config, Path(folder))
        try:
            why = _more_than_head(llm)
        except Exception as error:  # a forward that needs more than hidden states between decoder and head
            why = f"its forward on given hidden states ends with {type(error).__name__}"
    if why:
        raise Refusal(
            "C-MODEL", "the LLM computes more than lm_head(decoder(embeddings)), which is what is trained here",
            file=Path(folder) / "config.json", key="model_type", found=f"{config.model_type} ({why})",
            expected="llama, internlm2, mistral, qwen2, qwen3 or similar", fix="choose another LLM",
        )  # fmt: skip


def _more_than_head(llm: PreTrainedModel) -> str:
    """What ``llm`` does besides, "" for nothing. It is on the meta device, and of no use afterwards.

    No field of a configuration says so for every architecture, hence the class itself is asked: its forward runs, with
    its own configuration, on given hidden states through a small head, in place of its decoder and its own head.
    """
    own = llm.get_input_embeddings()
    for name, module in llm.named_modules():
        if not isinstance(module, nn.Embedding) or module is own:
            continue
        # A table of positions has far fewer rows than there are tokens, unless the vocabulary is small.
        of_positions = "position" in f"{name} {type(module).__name__}".lower()
        if not of_positions and module.num_embeddings > own.num_embeddings // 2:
            return f"it looks tokens up in a second table, {name}"
    generator = torch.Generator().manual_seed(0)
    hidden = 30 * torch.randn(1, 4, 8, generator=generator)  # (B, T, D), large, so that a cap shows
    head = nn.Linear(8, 16, bias=False, device="meta")
    head.weight = nn.Parameter(torch.randn(16, 8, generator=generator))
    for module in llm.modules():
        if isinstance(module, PreTrainedModel) and module is not llm:
            module.forward = lambda *_, **__: _Given(last_hidden_state=hidden)
    llm.lm_head = head
    with torch.no_grad():
        if torch.equal(llm(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits, head(hidden)):
            return ""
    fields = {field: getattr(llm.config, field, None) for field in LOGIT_FIELDS}
    named = ", ".join(f"{field} = {value}" for field, value in fields.items() if value not in (None, 1))
    return f"it scales or caps its logits{named and f': {named}'}"


def _generation_config(folder: Path) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    read_json(file, largest=LARGEST_CONFIG)
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises several exception types for invalid values
        fix = "download it again, or remove the file to use the library's defaults"
        raise Refusal("K-CONFIG", "not a generation config", file=file, found=error, fix=fix) from error


def llm_on_meta(config: PreTrainedConfig, source: Path) -> PreTrainedModel:
    """The LLM of ``config`` with every tensor on the meta device, in the configuration's dtype.

    Raises:
        Refusal: C-MODEL, not an LLM that LLaVA can contain, or the model cannot be built from the configuration.
    """
    model_class = _model_class(config, source)
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # such as an unknown activation
        what = f"no {model_class.__name__} can be built from this configuration"
        raise Refusal("C-MODEL", what, file=source, found=error, fix="download it again") from error


def read_llm_tensors(folder: str | Path, config: PreTrainedConfig) -> dict[str, LazyTensor]:
    """The LLM's tensors, not read yet, under the names of its transformers class; ``lm_head`` only if it is untied.

    Args:
        config: :func:`read_llm_config` of the same folder.

    Raises:
        Refusal: a file is missing or damaged; K-KEYS, K-SHAPE, not exactly the tensors of the architecture.
    """
    folder = Path(folder)
    raw = read_model_config(folder / "config.json")
    found = llava_folder.read_tensors(folder).llm if llava_folder.is_llava(raw) else read_tensor_folder(folder)
    found = {name: stored for name, stored in found.items() if not name.endswith(".inv_freq")}  # once a buffer
    if raw.get("model_type") == internlm2.MODEL_TYPE:
        found = internlm2.llama_tensors(found, config)
    expected = {name: tuple(p.shape) for name, p in llm_on_meta(config, folder).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop(HEAD_WEIGHT, None)
        found.pop(HEAD_WEIGHT, None)  # some folders contain it twice
    check_tensors(found, expected, folder)
    return found


def mean_row(weight: Tensor) -> Tensor:
    """The mean of all rows of [V, D] as [1, D], which appended tokens get; summed in float64, so that training and a
    later export compute the same."""
    return weight.double().mean(dim=0, keepdim=True).to(weight.dtype)


def quantised_weights(config: PreTrainedConfig, folder: Path) -> set[str]:
    """The names of the weights that ``bits=4`` quantises: those of all linears but the head."""
    modules = llm_on_meta(config, folder).named_modules()
    return {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)} - {HEAD_WEIGHT}


def load_llm(
    folder: str | Path, dtype: torch.dtype, bits: int = 16, quantised_from: torch.dtype | None = None
) -> PreTrainedModel:
    """The LLM in ``dtype``; with ``bits=4`` its linear layers in NF4, except the head.

    Mapped weights that already have ``dtype`` are not copied. Of the folder's generation settings only the token ids
    are kept: a penalty or beams that the base's makers recommend would act in answers that are said to be greedy, and
    not in an export, whose settings name nothing but its tokens.

    Args:
        quantised_from: with 4 bits, the dtype that weights are rounded to before they are quantised. Training rounds
            to its own: what it trained over is quantised again only from weights in that dtype. ``dtype`` if None.

    Raises:
        Refusal: as :func:`read_llm_config` and :func:`read_llm_tensors`.
    """
    folder, config = Path(folder), read_llm_config(folder)
    quantization = None
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head"],
        )
    elif bits != 16:
        raise Refusal("C-FLAG", "unsupported precision of the base", key="--bits", found=bits, expected="16 or 4")
    tensors = {}
    # Without quantisation and ZeRO-3 the weights are converted to their dtype here, one by one: transformers would keep
    # the originals in memory. Quantisation and ZeRO-3's rank 0 convert tensor by tensor themselves.
    as_kept = quantization is None and not is_deepspeed_zero3_enabled()
    rounded = quantised_weights(config, folder) if bits == 4 and quantised_from not in (None, dtype) else set()
    for name, stored in read_llm_tensors(folder, config).items():
        weight = stored.read().to(quantised_from) if name in rounded else stored.read()
        tensors[name] = weight.to(dtype) if as_kept else weight
    llm, info = _model_class(config, folder).from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        quantization_config=quantization,
        generation_config=_generation_config(folder),
        output_loading_info=True,
    )
    llm.config.name_or_path = str(folder)
    of_base = llm.generation_config
    llm.generation_config = GenerationConfig(
        bos_token_id=of_base.bos_token_id, eos_token_id=of_base.eos_token_id, pad_token_id=of_base.pad_token_id
    )
    left = info["missing_keys"] - ({HEAD_WEIGHT} if config.tie_word_embeddings else set())
    assert not left, f"compared, yet missing: {sorted(left)[:3]}"
    for module in llm.modules() if bits == 4 else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would repack weights at the first eval forward
            module.support_avx512bf16_for_cpu = False
    return llm


def with_old_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """A text configuration as JSON, with the rotary settings also where transformers 4 and vLLM look for them.

    transformers 5 writes only ``rope_parameters``; readers that do not know it silently use a base of 10,000, with
    which LLaMA-3 (500,000) or InternLM2 (1,000,000) generates nonsense.
    """
    rope = dict(raw.get("rope_parameters") or {})
    if "rope_theta" not in rope:
        return raw
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    scaling = None if kind == "default" else {"type": kind, "rope_type": kind, **rope}
    return raw | {"rope_theta": theta, "rope_scaling": scaling}
