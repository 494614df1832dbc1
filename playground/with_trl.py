"""MoSLoRA in TRL's trainers: supervised fine-tuning or DPO of any vision-language model that TRL takes.

    pip install trl
    python playground/with_trl.py sft --model MODEL --data rows.json --output_dir runs/trl --max_steps 100

``rows.json`` is a list of records as TRL takes them, with the paths of their images in ``images``. sft: ``messages``;
dpo: ``prompt``, ``chosen`` and ``rejected``. A ``MosLoraConfig`` is given where TRL takes PEFT's ``LoraConfig``. In the
end ``output_dir`` holds the adapter in training form, and ``output_dir/plain`` the same as a plain LoRA for stock PEFT.
"""

import argparse
import json
from pathlib import Path

from llava_moslora.noise import quiet_libraries

quiet_libraries()

from datasets import Dataset, Image, List
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llava_moslora import MosLoraConfig
from llava_moslora.adapters.fold import fold, save
from llava_moslora.adapters.load import read_adapter

LLM_LINEARS = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"
TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(TRAINERS))
    parser.add_argument("--model", required=True, help="a folder or a name that transformers loads")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--use_cpu", action="store_true")
    args = parser.parse_args()

    rows = Dataset.from_list(json.loads(args.data.read_text(encoding="utf-8")))
    trainer_class, config_class = TRAINERS[args.method]
    trainer = trainer_class(
        model=AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto"),
        processing_class=AutoProcessor.from_pretrained(args.model),
        train_dataset=rows.cast_column("images", List(Image())),
        peft_config=MosLoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=LLM_LINEARS),
        args=config_class(
            str(args.output_dir), max_steps=args.max_steps, learning_rate=args.learning_rate, use_cpu=args.use_cpu,
            bf16=not args.use_cpu, per_device_train_batch_size=2, logging_steps=1, report_to="none",
            max_length=None,  # a prompt that is cut off loses placeholders of its image
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(args.output_dir))
    save(fold(read_adapter(args.output_dir)), args.output_dir / "plain")


if __name__ == "__main__":
    main()
