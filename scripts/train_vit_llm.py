"""Fine-tune a LLaVA with MoSLoRA in the LLM and in the vision tower; or, stage 1, pretrain its projector.

    deepspeed scripts/train_vit_llm.py --deepspeed zero_configs/zero2.json \\
        --model_name_or_path LLM --vision_tower CLIP --pretrain_mm_mlp_adapter PROJECTOR \\
        --data_path llava_v1_5_mix665k.json --image_folder playground/data --output_dir runs/llama3-moslora --bf16 True

``--help`` lists the flags; every shell recipe next to this file is one complete call.
"""

import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, set_seed

from llava_moslora.config import AdapterSettings, DataSettings, ModelSettings
from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.prepare import keys_of, prepare, report_of
from llava_moslora.data.report import write_report
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.distributed import from_rank_0
from llava_moslora.errors import run_script
from llava_moslora.inference.load import ChatModel
from llava_moslora.models.adapt import add_adapters, parameter_table, train_projector_only
from llava_moslora.models.assemble import assemble
from llava_moslora.models.llava import Llava
from llava_moslora.models.llava_folder import name_parts
from llava_moslora.models.llm import longest_text, read_llm_config
from llava_moslora.models.towers import tokens_per_image
from llava_moslora.models.vision import read_image_settings, read_vision_config
from llava_moslora.recompute import set_recompute
from llava_moslora.runs.fingerprint import base_fingerprints
from llava_moslora.runs.folder import check_shared, check_space, open_run, write_first_files
from llava_moslora.runs.output_dir import check_output
from llava_moslora.runs.record import RunSettings
from llava_moslora.text.templates import recognise_template
from llava_moslora.text.tokenizer import load_tokenizer
from llava_moslora.training import process_group
from llava_moslora.training.arguments import TrainingArguments, input_paths, parse
from llava_moslora.training.callbacks.preemption import Preemption, catch_lost_ranks
from llava_moslora.training.callbacks.sample_answers import SampleAnswers, read_samples
from llava_moslora.training.optimizer_state import trained_count
from llava_moslora.training.trainer import MosLoraTrainer
from llava_moslora.training.validate import check, check_launch


@catch_lost_ranks()
def main() -> None:
    preemption = Preemption()
    preemption.install()

    # 1. The flags: each by itself, and all together once the ranks have met
    argv = sys.argv[1:]
    model_settings, data_settings, adapter_settings, training = parse(argv, __doc__)
    model_settings = name_parts(model_settings)
    check_launch(training["deepspeed"])
    if training["deepspeed"]:
        process_group.join(timedelta(seconds=training["ddp_timeout"]))
    args = TrainingArguments(**training)
    check(model_settings, adapter_settings, args)
    run, main_process = Path(args.output_dir), args.process_index == 0
    say = print if main_process else (lambda *_: None)
    inputs = input_paths(model_settings, data_settings, args, argv)
    if main_process:
        check_output(args, inputs, data_settings)

    # 2. The parts, looked at before any weight is read
    llm_config = read_llm_config(model_settings.model_name_or_path)
    vision_config = read_vision_config(model_settings.vision_tower)
    processor = read_image_settings(model_settings.vision_tower)
    transform = ImageTransform.from_settings(processor, data_settings)
    tokenizer = load_tokenizer(model_settings.model_name_or_path)
    template = model_settings.version or recognise_template(tokenizer)
    say(f"conversation template: {template}")

    # 3. The data, checked and tokenised once; found again by its content
    dataset = prepare(
        data_settings,
        tokenizer=tokenizer,
        template=template,
        tokens_per_image=tokens_per_image(vision_config),
        longest_text=longest_text(llm_config),
    )
    say("data: " + ", ".join(f"{name} {n:,}" for name, n in report_of(dataset).items() if isinstance(n, int)))
    sampler = GlobalBatchSampler.of(dataset, data_settings, **args.batches)

    # 4. The run folder: a new run, or the one to resume; what differs from it is refused before the LLM is loaded
    model_settings = replace(model_settings, version=template)
    settings = RunSettings(
        model_settings, data_settings, adapter_settings, args.as_record(), processor, args.global_batch_size
    )
    fingerprints = base_fingerprints(model_settings) | {"data": keys_of(dataset)}
    lock, checkpoint = open_run(args, settings, fingerprints, inputs) if main_process else (None, None)
    checkpoint = from_rank_0(checkpoint)

    # 5. The model and what trains it
    model = build_model(model_settings, adapter_settings, args, tokenizer)
    say(parameter_table(model))
    trainer = MosLoraTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator.of(data_settings, tokenizer, transform, packing=args.packing),
        sampler=sampler,
        facts=fingerprints,
        callbacks=[preemption],
    )
    if args.sample_questions:
        chat_model = ChatModel(model, tokenizer, template, transform)
        trainer.add_callback(sample_answers(chat_model, data_settings, args))
    trainer.create_optimizer()

    # 6. The run's first files, once nothing else can be refused
    if main_process:
        check_space(run, trained_count(model), checkpoints=2 if checkpoint is None else 1)
        report = partial(write_data_report, dataset=dataset, settings=data_settings, tokenizer=tokenizer, args=args)
        write_first_files(args, settings, tokenizer, report, inputs)
    check_shared(run)

    # 7. Train
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    if args.save_strategy == "no":
        say("--save_strategy no: nothing of this run will be saved")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    preemption.refuse_if_interrupted(run)
    say(closing_line(run, trainer.state.global_step))
    if lock is not None:
        lock.release()


def build_model(
    model_settings: ModelSettings,
    adapter_settings: AdapterSettings,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerFast,
) -> PeftModel | Llava:
    """Three parts in one model, frozen, and what is trained in it."""
    set_seed(args.seed)
    model, _ = assemble(model_settings, tokenizer=tokenizer, dtype=args.dtype)
    set_seed(args.seed)  # loading draws random numbers, under ZeRO-3 others: adapters begin the same under any stage
    if adapter_settings.tune_mm_mlp_adapter:
        model = train_projector_only(model)
    else:
        model = add_adapters(model, adapter_settings)
    set_recompute(model, args.recompute)
    return model


def sample_answers(chat_model: ChatModel, data: DataSettings, args: TrainingArguments) -> SampleAnswers:
    samples = read_samples(args.sample_questions, args.sample_image_folder or data.image_folder)
    return SampleAnswers(
        samples, chat_model, Path(args.output_dir), steps=args.sample_steps, max_new_tokens=args.sample_max_new_tokens
    )


def write_data_report(
    folder: Path,
    dataset: Dataset,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerFast,
    args: TrainingArguments,
) -> None:
    write_report(folder, dataset, settings=settings, tokenizer=tokenizer, batch_size=args.per_device_train_batch_size)


def closing_line(run: Path, step: int) -> str:
    if (run / f"checkpoint-{step}").is_dir():
        return f"trained: {run}; next: python scripts/export.py {run} --output_dir MERGED"
    return f"trained: {run}, and nothing was saved of step {step}, its last: there is nothing to export"


if __name__ == "__main__":
    run_script(main)
