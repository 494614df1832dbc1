"""Readers of models, tokenizers and adapters, each with a folder that they accept."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2 as pb
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_moslora.adapters.load import read_adapter
from llava_moslora.config import ModelSettings
from llava_moslora.export.card_data import read_base
from llava_moslora.models.llava_folder import name_parts
from llava_moslora.models.llm import llm_on_meta, longest_text, read_llm_config, read_llm_tensors
from llava_moslora.models.projector import read_projector
from llava_moslora.models.vision import read_image_settings, read_vision_config, read_vision_tensors
from llava_moslora.text.conversation import text_encoder
from llava_moslora.text.templates import recognise_template
from llava_moslora.text.tokenizer import load_tokenizer
from llava_moslora.text.tokenizer_template import derive_template
from support.adapter_models import Pair, adapted
from support.fuzzing import Reader
from support.internlm2_reference import write_internlm2
from support.mmengine_log import save_with_log
from support.tiny import write_clip, write_llm, write_projector, write_siglip
from support.tokenizer_folders import TINY

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer("hello <image> é</s>", add_special_tokens=False)
    text_encoder(tokenizer)
    tokenizer.save_pretrained(folder / "saved")
    recognise_template(tokenizer)


def _write_template(folder: Path) -> None:
    TINY["chatml"](folder)
    (folder / "chat_template.jinja").write_text(CHATML)


def _write_sentencepiece(folder: Path) -> None:
    model = pb.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    for number, piece in enumerate(pieces):
        kind = kinds.get(piece, 6 if piece.startswith("<0x") else 1)
        model.pieces.add(piece=piece, score=-float(number), type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = pb.TrainerSpec.BPE, True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.add_dummy_prefix = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true, "pad_token": "</s>"}')


def _read_llm(folder: Path, weights: bool = False) -> None:
    config = read_llm_config(folder)
    longest_text(config)
    llm_on_meta(config, folder)
    if weights:
        for tensor in read_llm_tensors(folder, config).values():
            tensor.read()


def _read_tower(folder: Path, prefix: str = "") -> None:
    spec = f"{prefix}{folder}"
    config = read_vision_config(spec)
    read_image_settings(spec)
    for tensor in read_vision_tensors(spec, config).values():
        tensor.read()


def _read_llava(folder: Path, tower: bool = True) -> None:
    settings = name_parts(ModelSettings(str(folder)))
    _read_llm(Path(settings.model_name_or_path))
    if settings.vision_tower and tower:
        _read_tower(Path(settings.vision_tower))
    read_projector(folder, 32, 64)


def _write_llava(folder: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(**text, vocab_size=384, bos_token_id=None),
        vision_config=CLIPVisionConfig(**tower, image_size=32, patch_size=8),
        image_token_index=380,
        image_seq_length=16,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    write_clip(folder / "clip")
    shutil.copy(folder / "clip" / "preprocessor_config.json", folder)
    shutil.rmtree(folder / "clip")


def _write_original(folder: Path) -> None:
    """LLaVA's own format, without a trained tower."""
    write_llm(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_select_layer": -2}
    config |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "clip", "mm_hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    write_projector(folder / "p.safetensors")
    own = {f"model.mm_projector.{k[6:]}": t for k, t in load_file(folder / "p.safetensors").items()}
    save_file(load_file(folder / "model.safetensors") | own, folder / "model.safetensors")
    (folder / "p.safetensors").unlink()


def _write_shards(folder: Path) -> None:
    write_llm(folder)
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="120KB")
    (folder / "model.safetensors").unlink()
    assert (folder / "model.safetensors.index.json").is_file()


def _write_torch(folder: Path) -> None:
    write_llm(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _write_generation(folder: Path) -> None:
    write_llm(folder)
    GenerationConfig(max_length=50, eos_token_id=[2, 3], pad_token_id=0).save_pretrained(folder)


def _write_open_clip(folder: Path) -> None:
    import open_clip
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16,
                 "heads": 2, "layers": 1}}  # fmt: skip
    model = CLIP(**model_cfg)
    preprocess = {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    assert open_clip.__version__


def _write_xtuner_projector(folder: Path) -> None:
    write_projector(folder / "model.safetensors")
    config = {"model_type": "projector", "depth": 2, "hidden_act": "gelu", "bias": True, "visual_hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config | {"llm_hidden_size": 64}))


def _write_torch_projector(folder: Path) -> None:
    write_projector(folder / "p.safetensors")
    tensors = load_file(folder / "p.safetensors")
    torch.save({f"model.mm_projector.{k[6:]}": t for k, t in tensors.items()}, folder / "mm_projector.bin")


def _write_mmengine(folder: Path) -> None:
    adapted(Pair()).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_with_log({f"llm.{name}": t for name, t in tensors.items() if "mixer" not in name}, folder / "iter_9.pth")


def _read_adapter(folder: Path) -> None:
    for layer in read_adapter(folder).layers.values():
        for tensor in (layer.a, layer.b):
            tensor.read()


def _write_lora(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(Pair(), LoraConfig(r=4, target_modules=["up", "down"])).save_pretrained(folder)


def _write_internlm2(folder: Path) -> None:
    folder.rmdir()
    write_internlm2(folder)


def _write_base(folder: Path) -> None:
    write_llm(folder)
    front = "---\nlicense: apache-2.0\nlicense_name: x\nlicense_link: LICENSE\ntags:\n- a\n---\n# A model\n"
    (folder / "README.md").write_text(front)
    (folder / "LICENSE").write_text("free")


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
READERS = [
    *(Reader(f"{name} {scheme}", {name: "json"}, TINY[scheme], _read_tokenizer)
      for name in TOKENIZER for scheme in ("chatml", "llama2-legacy")),
    Reader("chat template", {"chat_template.jinja": "text"}, _write_template,
           lambda folder: derive_template(load_tokenizer(folder))),
    Reader("SentencePiece model", {"tokenizer.model": "bytes"}, _write_sentencepiece, _read_tokenizer),
    Reader("LLM config.json", {"config.json": "json"}, write_llm, _read_llm),
    Reader("InternLM2 config.json", {"config.json": "json"}, _write_internlm2, _read_llm),
    Reader("LLaVA config.json", {"config.json": "json"}, _write_llava, _read_llava),
    Reader("original LLaVA config.json", {"config.json": "json"}, _write_original,
           partial(_read_llava, tower=False)),
    Reader("generation_config.json", {"generation_config.json": "json"}, _write_generation, _read_llm),
    Reader("LLM safetensors", {"model.safetensors": "safetensors"}, write_llm, partial(_read_llm, weights=True)),
    Reader("index of shards", {"model.safetensors.index.json": "json"}, _write_shards,
           partial(_read_llm, weights=True)),
    Reader("LLM .bin", {"pytorch_model.bin": "zip"}, _write_torch, partial(_read_llm, weights=True)),
    Reader("CLIP", {"config.json": "json", "model.safetensors": "safetensors"}, write_clip, _read_tower),
    Reader("SigLIP", {"config.json": "json"}, write_siglip, _read_tower),
    Reader("preprocessor_config.json CLIP", {"preprocessor_config.json": "json"}, write_clip, _read_tower),
    Reader("preprocessor_config.json SigLIP", {"preprocessor_config.json": "json"}, write_siglip, _read_tower),
    Reader("open_clip_config.json", {"open_clip_config.json": "json"}, _write_open_clip,
           partial(_read_tower, prefix="open_clip:")),
    Reader("projector safetensors", {"model.safetensors": "safetensors", "config.json": "json"},
           _write_xtuner_projector, lambda folder: read_projector(folder, 32, 64)),
    Reader("projector .bin", {"mm_projector.bin": "zip"}, _write_torch_projector,
           lambda folder: read_projector(folder / "mm_projector.bin", 32, 64)),
    Reader("mmengine .pth", {"iter_9.pth": "zip"}, _write_mmengine,
           lambda folder: read_adapter(folder / "iter_9.pth", lora_alpha=8)),
    Reader("adapter_config.json MoSLoRA", {"adapter_config.json": "json"},
           lambda folder: adapted(Pair()).save_pretrained(folder), _read_adapter),
    Reader("adapter_config.json LoRA", {"adapter_config.json": "json"}, _write_lora, _read_adapter),
    Reader("adapter weights", {"adapter_model.safetensors": "safetensors"},
           lambda folder: adapted(Pair()).save_pretrained(folder), _read_adapter),
    Reader("README of a base", {"README.md": "text"}, _write_base, lambda folder: read_base("llm", str(folder))),
]  # fmt: skip
