"""What a training step costs at real size: LLaMA-3-8B and CLIP-L/336 with random weights, on one GPU.

    python benchmarks/train.py [--steps 20] [--batch 8] [--keep FOLDER]

Three runs over the same batches, with gradient checkpointing, adapters of rank 64 in both towers and the projector:

- moslora: scripts/train_vit_llm.py in bf16 under ZeRO-2, a trained mixer everywhere;
- qmoslora: the same with the LLM in NF4;
- lora: stock PEFT's LoRA on stock LlavaForConditionalGeneration under a plain Hugging Face Trainer in bf16.

It prints one table (tokens per second, MFU, peak memory, the medians after five steps of warm-up) and writes
benchmarks/results/train-DEVICE.json. Without a GPU it refuses; --tiny runs the same code with tiny parts on a CPU and
writes no result unless --output names a file: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava_moslora.errors import Refusal, run_script

ROOT = Path(__file__).parents[1]
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_3_8B |= {"num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "bos_token_id": None}
CLIP_L_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L_336 |= {"image_size": 336, "patch_size": 14}
METHODS = ("moslora", "qmoslora", "lora")
WARM_UP = 5
FIGURES = ("tokens_per_second", "mfu", "peak_memory_gib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8, help="records per step")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--keep", type=Path, help="make the parts in this folder, or use those that are there")
    parser.add_argument("--tiny", action="store_true", help="tiny parts on a CPU: the code, not the cost")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/train-DEVICE.json")
    parser.add_argument("--stock", type=Path, help=argparse.SUPPRESS)  # the process that runs lora, on these parts
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise Refusal("E-DEVICE", "needs a GPU with about 40 GB", found="none", fix="--tiny runs the code on a CPU")
    if args.stock:
        train_stock(args.stock, args)
        return
    folder = args.keep or Path(tempfile.mkdtemp(prefix="train-benchmark-"))
    try:
        if not (folder / "done").exists():
            make_parts(folder, args)
        figures = {method: measure(method, folder, args) for method in args.methods}
    finally:
        if args.keep is None:
            shutil.rmtree(folder)
    report(figures, args)


def make_parts(folder: Path, args: argparse.Namespace) -> None:
    """Random parts on disk, so that the runs load them as they would load real ones."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import WORDS, tiny_tokenizer, write_clip, write_llm, write_projector  # the tests' tokenizer serves here

    folder.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        write_llm(folder / "llm")
        write_clip(folder / "clip")
        write_projector(folder / "projector.safetensors")
    else:
        tokenizer = tiny_tokenizer()
        config = LlamaConfig(**LLAMA_3_8B, eos_token_id=tokenizer.eos_token_id, pad_token_id=None, dtype="bfloat16")
        write_random_llm(config, folder / "llm")
        tokenizer.save_pretrained(folder / "llm")
        write_clip(folder / "clip", **CLIP_L_336)
        write_projector(folder / "projector.safetensors", vision=1024, llm=4096)
    random = np.random.default_rng(0)
    (folder / "images").mkdir(exist_ok=True)
    rows = []
    for index in range(args.steps * args.batch):
        side = 64 if args.tiny else 480
        Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(
            folder / "images" / f"{index}.jpg"
        )
        question, answer = (" ".join(random.choice(WORDS, size=size)) for size in ((8, 4) if args.tiny else (240, 120)))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "done").touch()


def write_random_llm(config: LlamaConfig, folder: Path) -> None:
    """One file per layer, made on the GPU: the whole model is never in memory."""
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        files.setdefault(f"layer-{parts[2]}" if parts[1] == "layers" else "rest", []).append(name)
    index = {}
    for file, names in files.items():
        tensors = {name: torch.randn(shapes[name], device="cuda", dtype=torch.bfloat16) * 0.02 for name in names}
        for name in names:
            if name.endswith("norm.weight"):
                tensors[name].fill_(1)
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / f"{file}.safetensors")
        index |= dict.fromkeys(names, f"{file}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def measure(method: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    run = folder / f"run-{method}"
    shutil.rmtree(run, ignore_errors=True)
    print(f"== {method}", flush=True)
    if method == "lora":
        command = [sys.executable, __file__, "--stock", folder, "--steps", args.steps, "--batch", args.batch]
        command += ["--tiny"] * args.tiny
    else:
        command = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", 1, "--master_addr", "127.0.0.1"]
        command += [ROOT / "scripts" / "train_vit_llm.py", "--deepspeed", ROOT / "zero_configs" / "zero2.json"]
        command += [word for name, value in flags(method, folder, run, args).items() for word in (f"--{name}", value)]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Refusal("E-RUN", f"{method} ended with status {done.returncode}", found=done.stderr[-300:])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = rows[min(WARM_UP, len(rows) - 1) :]
    # the peak of a step is in every later row: it is the run's
    return {
        name: max(row[name] for row in rows)
        if name == "peak_memory_gib"
        else statistics.median(r[name] for r in counted)
        for name in FIGURES
        if name in rows[-1]
    }


def flags(method: str, folder: Path, run: Path, args: argparse.Namespace) -> dict[str, object]:
    return {
        "model_name_or_path": folder / "llm",
        "vision_tower": folder / "clip",
        "pretrain_mm_mlp_adapter": folder / "projector.safetensors",
        "data_path": folder / "data.json",
        "image_folder": folder / "images",
        "data_cache": folder / "cache",
        "data_order": "sequential",
        "bits": 4 if method == "qmoslora" else 16,
        "lora_r": 4 if args.tiny else 64,
        "vision_lora_r": 4 if args.tiny else 64,
        "learning_rate": 2e-5,
        "per_device_train_batch_size": args.batch,
        "max_steps": args.steps,
        "save_strategy": "no",
        "health_steps": 0,
        "bf16": True,
        "gradient_checkpointing": True,
        "output_dir": run,
    }


def train_stock(folder: Path, args: argparse.Namespace) -> None:
    """Stock PEFT's LoRA on the stock model under a plain Trainer, over the batches of the other two."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

    from llava_moslora.data.collate import Collator
    from llava_moslora.data.images import ImageTransform
    from llava_moslora.data.prepare import prepare
    from llava_moslora.data.tokenizer import image_token_id, load_tokenizer
    from llava_moslora.models.assemble import LLM, PROJECTOR, VISION, assemble, linear_suffixes, tokens_per_picture
    from llava_moslora.training import metrics
    from llava_moslora.training.speed import Speed

    run = folder / "run-lora"
    run.mkdir()
    tokenizer = load_tokenizer(folder / "llm")
    model, preprocessor = assemble(
        folder / "llm",
        str(folder / "clip"),
        folder / "projector.safetensors",
        tokenizer=tokenizer,
        image_token_id=image_token_id(tokenizer),
        dtype=torch.bfloat16,
    )
    model.__class__ = LlavaForConditionalGeneration  # the same weights under the stock forward
    names = "|".join(name for tower in (LLM, VISION) for name in linear_suffixes(model, tower))
    rank = 4 if args.tiny else 64
    targets = rf"(?:{LLM}|{VISION})\.(?:encoder\.)?layers\.\d+\.(?:{names})"
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=targets, modules_to_save=[PROJECTOR]
    )
    model = get_peft_model(model, config)
    model.enable_input_require_grads()
    dataset = prepare(
        folder / "data.json",
        folder / "images",
        tokenizer=tokenizer,
        template="chatml",
        tokens_per_image=tokens_per_picture(model.config.vision_config),
        max_length=2048,
        cache_dir=folder / "cache",
    )
    collate = Collator(tokenizer.pad_token_id, folder / "images", ImageTransform.from_settings(preprocessor, "pad"))

    class Measured(Trainer):
        def get_batch_samples(self, *words):
            batches, tokens = super().get_batch_samples(*words)
            for batch in batches:
                batch.pop("record")
                self.speed.count(batch)
                for ours_only in ("lengths", "label_positions"):  # the model is stock transformers'
                    del batch[ours_only]
            return batches, tokens

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def log(self, logs, start_time=None):
            if "loss" in logs:
                logs |= self.speed.figures()
                metrics.append(run / metrics.FILE, {"step": self.state.global_step, **logs})
            super().log(logs, start_time)

    settings = {"per_device_train_batch_size": args.batch, "max_steps": args.steps, "learning_rate": 2e-5}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "remove_unused_columns": False}
    settings |= {"bf16": True, "gradient_checkpointing": True, "use_cpu": args.tiny, "output_dir": str(run)}
    trainer = Measured(model=model, args=TrainingArguments(**settings), train_dataset=dataset, data_collator=collate)
    trainer.speed = Speed(model, trainer.args.device)
    trainer.train()


def report(figures: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    device = "cpu" if args.tiny else torch.cuda.get_device_name()
    print(f"\n{'tiny parts' if args.tiny else 'LLaMA-3-8B + CLIP-L/336'} on {device}, {args.batch} records per step")
    print(f"{'':<10}{'tokens/s':>10}{'MFU':>8}{'peak GiB':>10}{'tokens/s : lora':>18}")
    base = figures.get("lora", {}).get("tokens_per_second")
    for method, row in figures.items():
        ratio = f"{row['tokens_per_second'] / base:.2f}" if base else ""
        cells = [f"{row['tokens_per_second']:.0f}", f"{row.get('mfu', float('nan')):.1%}"]
        cells += [f"{row.get('peak_memory_gib', float('nan')):.1f}", ratio]
        print(f"{method:<10}{cells[0]:>10}{cells[1]:>8}{cells[2]:>10}{cells[3]:>18}")
    output = args.output
    if output is None and not args.tiny:
        output = ROOT / "benchmarks" / "results" / f"train-{device.lower().replace(' ', '-')}.json"
    if output is not None:
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "deepspeed")}
        facts = {"device": device, "python": platform.python_version(), "versions": versions}
        shape = {"steps": args.steps, "batch": args.batch, "tiny": args.tiny}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**facts, **shape, "figures": figures}, indent=2) + "\n")
        print(f"written: {output}")


if __name__ == "__main__":
    run_script(main)
