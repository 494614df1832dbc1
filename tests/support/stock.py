"""What a user of the stock Trainer has: its own checkpoints and ``get_last_checkpoint``, on the same model and data."""

from __future__ import annotations

import sys
from pathlib import Path

from support.warm_server import note


def main() -> None:
    from train_vit_llm import Collator, ImageTransform, TrainingArguments, add_adapters, assemble, parse, prepare
    from transformers import Trainer, set_seed
    from transformers import TrainingArguments as StockArguments
    from transformers.trainer_utils import get_last_checkpoint

    from llava_moslora.models.towers import tokens_per_image
    from llava_moslora.models.vision import read_vision_config
    from llava_moslora.text.tokenizer import load_tokenizer

    model_args, data_args, adapter_args, training = parse(sys.argv[1:])
    ours = TrainingArguments(**training)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    patches = tokens_per_image(read_vision_config(model_args.vision_tower))
    dataset = prepare(data_args, tokenizer=tokenizer, template="chatml", tokens_per_image=patches)
    set_seed(ours.seed)
    model, preprocessor = assemble(model_args, tokenizer=tokenizer, dtype=ours.dtype)
    model = add_adapters(model, adapter_args)
    collate = Collator(
        tokenizer.pad_token_id,
        data_args.image_folder,
        ImageTransform.from_settings(preprocessor, data_args),
    )
    args = StockArguments(
        output_dir=ours.output_dir,
        per_device_train_batch_size=ours.per_device_train_batch_size,
        gradient_accumulation_steps=ours.gradient_accumulation_steps,
        max_steps=ours.max_steps,
        save_steps=ours.save_steps,
        save_total_limit=ours.save_total_limit,
        learning_rate=ours.learning_rate,
        deepspeed=ours.deepspeed,
        remove_unused_columns=False,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=ours.use_cpu,
    )

    class Stock(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen = inputs.pop("record").tolist()
            del inputs["lengths"]
            loss = super().training_step(model, inputs, num_items_in_batch)
            note(self.state.global_step + 1, seen, loss)
            return loss

    run = Path(ours.output_dir)
    run.mkdir(parents=True, exist_ok=True)
    trainer = Stock(model=model, args=args, train_dataset=dataset, data_collator=collate)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(run))
