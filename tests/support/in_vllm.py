"""Runs in an environment of its own that has vLLM, never in the tests' process: what vLLM makes of an export.

    python in_vllm.py QUESTIONS HF VLLM [OTHER …]      # questions.json of a probe; folders of exports; adapters

Prints one line of JSON: the adapter's modules as vLLM's loader names them, and for each of ``hf`` (merged), ``base``,
``adapter`` and the other adapters over the base, per question the prompt's ids, the answer's ids and their
log-probabilities, or the error.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def main() -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    questions_file, hf, export, *others = map(Path, sys.argv[1:])
    asked = json.loads(questions_file.read_text())["questions"]
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=1)
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_batched_tokens": 1024}

    def turns(question: dict) -> list:
        roles = {"human": "user", "gpt": "assistant"}
        images = [Image.open(questions_file.parent / name).convert("RGB") for name in question["images"]]
        found = []
        for turn in question["turns"]:
            text = turn["text"].removeprefix("<image>\n")
            content = [{"type": "image_pil", "image_pil": images.pop(0)}] if text != turn["text"] else []
            found.append({"role": roles[turn["role"]], "content": [*content, {"type": "text", "text": text}]})
        return found

    def answers(llm, adapter: Path | None, number: int = 0) -> list | str:
        request = LoRARequest(str(adapter), number, str(adapter)) if adapter else None
        found = []
        try:
            for question in asked:
                result = llm.chat(turns(question), sampling, lora_request=request, use_tqdm=False)[0]
                output = result.outputs[0]
                chosen = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
                found.append([list(result.prompt_token_ids), list(output.token_ids), chosen])
        except ValueError as error:
            return str(error)
        return found

    report: dict = {"modules": modules(export / "adapter"), "hf": answers(LLM(str(hf), **settings), None)}
    llm = LLM(str(export / "base"), enable_lora=True, max_lora_rank=8, **settings)
    report |= {"base": answers(llm, None), "adapter": answers(llm, export / "adapter", 1)}
    for number, other in enumerate(others, start=2):
        report[str(other)] = answers(llm, other, number)
    print("\n" + json.dumps(report))


def modules(adapter: Path) -> list[str]:
    """As ``LoRAModel`` names them, once ``PEFTHelper`` accepts the configuration."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    helper = PEFTHelper.from_local_dir(str(adapter), 256)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper
    lora = LoRAModel.from_local_checkpoint(str(adapter), MODULES, helper, device="cpu", weights_mapper=mapper)
    return sorted(lora.loras)


if __name__ == "__main__":
    main()
