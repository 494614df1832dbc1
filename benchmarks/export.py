"""Merging adapters into a large LLM: the streaming export and PEFT's merge_and_unload().save_pretrained().

    python benchmarks/export.py                # a 4 GB LLM, bfloat16, every linear adapted at rank 64
    python benchmarks/export.py --gigabytes 1 --rank 16

Both start from the same base folder and the same adapters (PEFT from the plain LoRA that ``--format peft`` writes),
each in a separate process; time is measured after imports, memory is the process's peak (VmHWM, which includes
mapped files). The tensors of both results are compared. The export also hashes and fsyncs what it wrote; PEFT does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, PreTrainedTokenizerFast

from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings
from llava_moslora.export.export import export
from llava_moslora.export.writer import PlannedTensor, WeightFiles, write_weights
from llava_moslora.files.tensors import LazyTensor
from llava_moslora.models.assemble import model_on_meta
from llava_moslora.models.llm import llm_on_meta
from llava_moslora.models.names import ADAPTER_NAME
from llava_moslora.models.vision import read_image_settings
from llava_moslora.runs.checkpoints import publish_checkpoint
from llava_moslora.runs.fingerprint import base_fingerprints
from llava_moslora.runs.record import TOKENIZER, RunSettings, write_run
from llava_moslora.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
MEMORY, TIME = 0.25, 1.0  # at most, as ratios to PEFT's

PEAK = """
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": int(peak) * 1024}))
"""
SIDES = {
    "imports": "import json, sys, time, torch, transformers, peft\nstart = time.perf_counter()",
    "ours": """
import json, sys, time
from llava_moslora.export.export import export
import peft, transformers
start = time.perf_counter()
export(sys.argv[1], sys.argv[4], ["llm"], prove=False)
""",
    "peft": """
import json, sys, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, sys.argv[3])
model.merge_and_unload().save_pretrained(sys.argv[4])
""",
}


def write_base(folder: Path, gigabytes: float) -> Path:
    """A random LLM of LLaMA's shape and about ``gigabytes`` in bfloat16, written in shards, with a tokenizer."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if gigabytes < 3:
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(
        **shape, vocab_size=32064, num_hidden_layers=1, bos_token_id=None, eos_token_id=1, dtype="bfloat16"
    )
    of = lambda layers: sum(p.numel() for p in llm_on_meta(layers, folder).parameters())  # noqa: E731
    one = of(config)
    config.num_hidden_layers = 2
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 / 2 - one) / (of(config) - one)) + 1)
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    state = llm_on_meta(config, folder).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    plan = [PlannedTensor(name, LazyTensor(folder, s, lambda s=s: draw(s))) for name, s in shapes.items()]
    write_weights(folder, [WeightFiles("", plan, torch.bfloat16)])
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = {"<|endoftext|>": 0, "<|im_end|>": 1, "<|im_start|>": 2, "<image>": 3, "a": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_tower(folder: Path) -> Path:
    config = CLIPVisionConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                              image_size=56, patch_size=14)  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    side = {"height": 56, "width": 56}
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": side,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def write_run_folder(run: Path, llm: Path, tower: Path, rank: int) -> None:
    """A run over them with random factors, made without ever making the model: shapes come from the meta device."""
    adapter = AdapterSettings(lora_r=rank, lora_alpha=2 * rank, vision_lora_r=16, vision_lora_alpha=16)
    configs = LlamaConfig.from_pretrained(llm), CLIPVisionConfig.from_pretrained(tower)
    model = model_on_meta(*configs, adapter)
    generator = torch.Generator().manual_seed(1)
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.replace(f".modules_to_save.{ADAPTER_NAME}", "").replace(f".{ADAPTER_NAME}.", ".")
            trained[name] = torch.randn(parameter.shape, generator=generator) * 0.02
    run.mkdir()
    parts = ModelSettings(str(llm), vision_tower=str(tower), version="chatml")
    processor = read_image_settings(tower)
    write_run(run, RunSettings(parts, DataSettings(data_path=[]), adapter, training={}, preprocessor=processor))
    load_tokenizer(llm).save_pretrained(run / TOKENIZER)

    def save(folder: Path) -> None:
        (folder / "adapter").mkdir()
        save_file(trained, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        model.peft_config[ADAPTER_NAME].save_pretrained(str(folder / "adapter"))

    facts = {"step": 1, "data": {}} | base_fingerprints(parts)
    publish_checkpoint(run / "checkpoint-1", save, lambda: facts)


def measure(side: str, run: Path, llm: Path, adapter: Path, output: Path) -> dict:
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-c", SIDES[side] + PEAK, *map(str, (run, llm, adapter, output))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(ours: Path, theirs: Path) -> float:
    """Of all tensors of the two folders, which must have the same names."""
    places = []
    for folder in (ours, theirs):
        files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        places.append({name: opened for opened in files for name in opened.keys()})  # noqa: SIM118
    assert places[0].keys() == places[1].keys()
    return max(
        (places[0][n].get_tensor(n).float() - places[1][n].get_tensor(n).float()).abs().max().item() for n in places[0]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="the best counts")
    parser.add_argument(
        "--work", type=Path, help="where to put folders of four times the size; default: the temporary one"
    )
    parser.add_argument("--quick", action="store_true", help="0.2 GB, once; writes nothing")
    args = parser.parse_args()
    gigabytes, repeats = (0.2, 1) if args.quick else (args.gigabytes, args.repeats)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        work = Path(work)
        llm, tower = write_base(work / "llm", gigabytes), write_tower(work / "clip")
        size = sum(file.stat().st_size for file in llm.glob("*.safetensors"))
        write_run_folder(work / "run", llm, tower, args.rank)
        export(work / "run", work / "folded", ["peft"], prove=False)
        paths = work / "run", llm, work / "folded" / "llm_adapter"
        print(f"{platform.machine()}, {os.cpu_count()} cores; LLM of {size / 1e9:.2f} GB, rank {args.rank}")
        best = {"imports": measure("imports", *paths, work / "none")}
        for _ in range(repeats):
            for side in ("peft", "ours"):  # interleaved, so that other load affects both
                found = measure(side, *paths, work / side)
                best[side] = {key: min(found[key], best.get(side, found)[key]) for key in found}
        difference = largest_difference(work / "ours", work / "peft")
    for side, row in best.items():
        print(f"{side:8} {row['seconds']:8.1f} s {row['bytes'] / 1e9:8.2f} GB at the peak")
    print(f"the largest difference of a merged weight: {difference:.2g} (bfloat16)")
    ratios = {key: best["ours"][key] / best["peft"][key] for key in ("bytes", "seconds")}
    targets = [{"what": "peak memory", "at_most": MEMORY, "found": round(ratios["bytes"], 3)},
               {"what": "time", "at_most": TIME, "found": round(ratios["seconds"], 3)}]  # fmt: skip
    print("\n".join("{what}: {found} × PEFT's, at most {at_most}".format(**target) for target in targets))
    if not args.quick:
        result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "llm_bytes": size, "rank": args.rank,
                  "largest_difference": difference, "sides": best, "targets": targets}  # fmt: skip
        file = Path(__file__).parent / "results" / "export.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
