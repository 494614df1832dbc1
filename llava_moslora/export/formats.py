"""The export formats (``--format``) with a one-sentence summary, and the choices of their flags. The formats'
targets are in ``export/targets/``; this module imports nothing, so that --help is fast.
"""

ORIGINAL, DEQUANTIZED = "original", "dequantized"  # what a run over a 4-bit LLM can be merged into

FORMATS: dict[str, str] = {
    "hf": "the merged model as one `LlavaForConditionalGeneration` with its processor: transformers 4.49 to 5, "
    "vLLM, lmms-eval",
    "peft": "plain LoRA adapters for stock PEFT over the original LLM and vision tower, and the projector; "
    "not for a LLaVA in vLLM",
    "peft_with_base": "one plain LoRA adapter over a complete base LLaVA that is written next to it; also as "
    "`--format peft --with_base`; vLLM refuses its projector",
    "vllm": "a base LLaVA with the trained projector and the merged vision tower, and next to it the LLM's adapters as "
    "one plain LoRA: for vLLM's `--enable-lora`, and for stock PEFT",
    "xtuner": "the folders `llm/`, `visual_encoder/` and `projector/`, merged, as XTuner and VLMEvalKit's "
    "`LLaVA_XTuner` load them",
    "xtuner_adapters": "the folders `llm_adapter/`, `visual_encoder_adapter/` and `projector/` for the same tools, "
    "the adapters not merged",
    "llava": "the merged model as the original LLaVA's `LlavaLlamaForCausalLM`, with the tuned vision tower inside",
    "llm": "only the merged LLM, as a causal LM of transformers (an InternLM2 as a Llama); also for llama.cpp",
    "vision": "only the merged vision tower, as transformers' `CLIPVisionModel` or `SiglipVisionModel`",
    "projector": "only the projector, in the layout that XTuner publishes; `--pretrain_mm_mlp_adapter` takes the "
    "folder",
}
# Of a run of scripts/train_sdxl.py
DIFFUSERS = "diffusers"
SDXL_FORMATS: dict[str, str] = {
    DIFFUSERS: "for an SDXL run: `pytorch_lora_weights.safetensors`, a plain LoRA that diffusers and ComfyUI load; "
    "with `--kohya` also with kohya's key names",
}
