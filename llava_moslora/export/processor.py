"""The processor files of an export, for transformers 4 and 5: images and prompts are made as in training."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_moslora.files.json import write_json
from llava_moslora.models.preprocessing import CLIP_PROCESSOR, SIGLIP_PROCESSOR
from llava_moslora.models.towers import kind_of
from llava_moslora.text.conversation import chat_template

PROCESSORS = {CLIP_PROCESSOR: CLIPImageProcessorPil, SIGLIP_PROCESSOR: SiglipImageProcessorPil}


def write_processor(folder: Path, tokenizer, template: str, preprocessor: dict, vision_config, *, pad: bool) -> None:
    """Tokenizer, ``chat_template.jinja``, ``processor_config.json`` and ``preprocessor_config.json`` into ``folder``.

    Args:
        preprocessor: the tower's settings, as its own ``preprocessor_config.json`` holds them.
        pad: images are padded to a square first (stage 2); otherwise the centre is cropped (stage 1). The class that
            pads came with transformers 4.49; earlier ones stop at its name instead of cropping.
    """
    settings = {k: v for k, v in preprocessor.items() if k not in ("image_processor_type", "processor_class")}
    kind = preprocessor["image_processor_type"]
    if not settings["do_center_crop"] and "height" in settings["size"]:
        settings["crop_size"] = settings["size"]  # who asks for an image's tokens beforehand is told by this one
    image_processor = LlavaImageProcessorPil(**settings, do_pad=True) if pad else PROCESSORS[kind](**settings)
    tower = kind_of(vision_config)
    tokenizer.chat_template = chat_template(template, tokenizer)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy=tower.strategy,
        # A class token: the tower returns it, "default" drops it again. Left at 0 there, an image would get one
        # placeholder too few.
        num_additional_image_tokens=tower.class_tokens,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    known_to_transformers_4(folder)
    # transformers 5 writes the image's settings into processor_config.json, where 4.49 stumbles over them. All
    # versions and XTuner read them from this file, under the name of the class without its backend.
    file = folder / "processor_config.json"
    write_json(file, {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if k != "image_processor"})
    write_json(
        folder / "preprocessor_config.json",
        {
            **settings,
            **({"do_pad": True} if pad else {}),
            "image_processor_type": "LlavaImageProcessor" if pad else kind,
            "processor_class": "LlavaProcessor",
        },
    )


def known_to_transformers_4(folder: Path) -> None:
    """The tokenizer's class under the name that transformers 4 knows, and 5 too, and the inputs that it makes.

    Left unsaid, transformers 4 makes ``token_type_ids`` as well, which ``generate`` refuses.
    """
    file = folder / "tokenizer_config.json"
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | known)
