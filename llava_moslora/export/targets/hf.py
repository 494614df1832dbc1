"""``hf``: the merged model as one ``LlavaForConditionalGeneration`` folder, in the layout that all readers support.

Tensors carry the names of transformers 4.36–4.51 (``language_model.model.…``, ``vision_tower.vision_model.…``), which
later versions and vLLM rename on loading; names are made here, never taken from a live model. The processor's files
are written for transformers 4 and 5: images and prompts are made as in training.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_moslora.export import writer
from llava_moslora.export.formats import FORMATS
from llava_moslora.export.target import ExportPlan, Target
from llava_moslora.export.trained_run import TrainedRun
from llava_moslora.export.writer import PlannedTensor, WeightFiles, plan_tensors, renamed
from llava_moslora.files.disk import read_json, write_json
from llava_moslora.models.names import PARTS
from llava_moslora.models.preprocessing import CLIP_PROCESSOR, SIGLIP_PROCESSOR
from llava_moslora.models.towers import kind_of, tokens_per_image
from llava_moslora.text.tokenizer import image_token_id

PROCESSORS = {CLIP_PROCESSOR: CLIPImageProcessorPil, SIGLIP_PROCESSOR: SiglipImageProcessorPil}


def plan(trained: TrainedRun, dtype: torch.dtype) -> ExportPlan:
    return ExportPlan(
        weights=[WeightFiles("", tensors(trained), dtype)],
        write_files=lambda folder: write_files(trained, folder, dtype),
        load_from={"llava": "."},
        rounded=tuple(PARTS),
    )


# Python that uses ``model`` and ``processor``, for the model card
ASK = """turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
image = Image.open("photo.jpg").convert("RGB")
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.dtype)
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(answer, skip_special_tokens=True))"""

TARGET = Target(
    name="hf",
    summary=FORMATS["hf"],
    usage=f"""from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(FOLDER, backend="pil")  # scales images as in training
model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="auto")
{ASK}""",
    plan=plan,
)


def tensors(
    trained: TrainedRun, projector: dict[str, Tensor] | None = None, *, merged: Collection[str] = tuple(PARTS)
) -> list[PlannedTensor]:
    """All tensors under their published names.

    Args:
        projector: in place of the trained one. merged: the parts with their adapters; the others without.
    """
    return [
        *renamed(trained.llm_tensors(merged="llm" in merged), ("", "language_model.")),
        *renamed(trained.vision_tensors(merged="vision_tower" in merged), ("", "vision_tower.vision_model.")),
        *renamed(plan_tensors(projector or trained.projector), ("", "multi_modal_projector.")),
    ]


def write_files(trained: TrainedRun, folder: Path, dtype: torch.dtype) -> None:
    writer.save_config(llava_config(trained, dtype), folder)
    trained.generation_config().save_pretrained(folder)
    write_processor(trained, folder)


def llava_config(trained: TrainedRun, dtype: torch.dtype) -> LlavaConfig:
    """As published by llava-hf: the feature layer counted from the end, over a complete tower; the head untied."""
    return LlavaConfig(
        text_config=trained.exported_llm_config(dtype),
        vision_config=trained.exported_vision_config(dtype),
        image_token_index=image_token_id(trained.tokenizer),
        image_seq_length=tokens_per_image(trained.vision_config),
        vision_feature_layer=-2,
        vision_feature_select_strategy=kind_of(trained.vision_config).strategy,
        projector_hidden_act="gelu",
        pad_token_id=trained.tokenizer.pad_token_id,
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
        dtype=dtype,
    )


def write_processor(trained: TrainedRun, folder: Path) -> None:
    """Tokenizer, ``chat_template.jinja``, ``processor_config.json`` and ``preprocessor_config.json``.

    Images are padded to a square first if training did so; otherwise the centre is cropped. The image processor
    that pads was added in transformers 4.49; earlier versions fail on its name instead of cropping.
    """
    trained_with = trained.record.preprocessor
    own_type = trained_with["image_processor_type"]
    settings = {k: v for k, v in trained_with.items() if k not in ("image_processor_type", "processor_class")}
    if not settings["do_center_crop"] and "height" in settings["size"]:
        settings["crop_size"] = settings["size"]  # from which a server computes the number of an image's tokens
    if trained.pads:
        image_processor = LlavaImageProcessorPil(**settings, do_pad=True)
    else:
        image_processor = PROCESSORS[own_type](**settings)
    tower = kind_of(trained.vision_config)
    tokenizer = trained.tokenizer_with_template()
    processor = LlavaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, patch_size=trained.vision_config.patch_size,
        chat_template=tokenizer.chat_template, vision_feature_select_strategy=tower.strategy,
        # A class token: the tower returns it, "default" drops it again. Left at 0 there, an image would get one
        # placeholder too few.
        num_additional_image_tokens=tower.class_tokens,
    )  # fmt: skip
    processor.save_pretrained(folder)
    writer.known_to_transformers_4(folder)
    # transformers 5 writes the image's settings into processor_config.json, where 4.49 stumbles over them. All
    # versions and XTuner read them from preprocessor_config.json, under the name of the class without its backend.
    file = folder / "processor_config.json"
    write_json(file, {key: value for key, value in read_json(file).items() if key != "image_processor"})
    settings |= (
        {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
        if trained.pads
        else {"image_processor_type": own_type}
    )
    settings["processor_class"] = "LlavaProcessor"
    write_json(folder / "preprocessor_config.json", settings)
