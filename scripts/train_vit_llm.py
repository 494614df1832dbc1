"""Fine-tune a LLaVA with MoSLoRA in the LLM and in the vision tower; or, stage 1, pretrain its projector.

    deepspeed scripts/train_vit_llm.py --deepspeed zero_configs/zero2.json \\
        --model_name_or_path LLM --vision_tower CLIP --pretrain_mm_mlp_adapter PROJECTOR \\
        --data_path llava_v1_5_mix665k.json --image_folder playground/data --output_dir runs/llama3-moslora --bf16 True

``--help`` lists the flags; every shell recipe beside this file is one complete call.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import set_seed

from llava_moslora.adapters.kernel import mask_source
from llava_moslora.config import DataSettings
from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.prepare import keys_of, prepare, report_of
from llava_moslora.data.report import write_report
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.distributed import from_rank_0
from llava_moslora.errors import run_script
from llava_moslora.inference.load import ChatModel
from llava_moslora.models.assemble import (
    add_adapters,
    assemble,
    describe,
    read_llm_config,
    tokens_per_image,
    train_projector_only,
)
from llava_moslora.models.llm import longest_text
from llava_moslora.models.vision import read_image_settings, read_vision_config
from llava_moslora.recompute import set_recompute
from llava_moslora.runs.record import TOKENIZER, fingerprint, write_run
from llava_moslora.text.conversation import recognise_template
from llava_moslora.text.tokenizer import image_token_id, load_tokenizer
from llava_moslora.training.arguments import config_file, parse, tower_adapters
from llava_moslora.training.callbacks.preemption import Preemption, contact
from llava_moslora.training.callbacks.sample_answers import SampleAnswers, read_samples
from llava_moslora.training.optimizer_state import trained_count
from llava_moslora.training.output_dir import DATA_REPORT, check_output, has_begun, input_paths
from llava_moslora.training.run_folder import begin_run, check_shared, check_space, open_run, reopen_run
from llava_moslora.training.trainer import MosLoraTrainer
from llava_moslora.training.validate import check, check_launch


@contact()
def main() -> None:
    pause = Preemption()
    pause.listen()
    model_args, data_args, adapter_args, args = parse(sys.argv[1:])
    data_args = DataSettings(**vars(data_args))
    check(model_args, adapter_args, args)
    check_launch(args)
    main_process = args.process_index == 0
    say = print if main_process else (lambda *_: None)
    run = Path(args.output_dir)
    inputs = input_paths(model_args, data_args, args, config_file(sys.argv[1:]))
    if main_process:
        check_output(run, resume=args.resume, overwrite=args.overwrite, inputs=inputs, data_cache=data_args.data_cache)

    # 1. The parts, looked at before any weight is read
    llm_config = read_llm_config(model_args.model_name_or_path)
    vision_config = read_vision_config(model_args.vision_tower)
    transform = ImageTransform.from_settings(read_image_settings(model_args.vision_tower), data_args)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    template = model_args.version or recognise_template(tokenizer)
    say(f"conversation template: {template}")

    # 2. The data, checked and tokenised once; found again by its content
    dataset = prepare(
        data_args,
        tokenizer=tokenizer,
        template=template,
        tokens_per_image=tokens_per_image(vision_config),
        longest_text=longest_text(llm_config),
    )
    say("data: " + ", ".join(f"{name} {n:,}" for name, n in report_of(dataset).items() if isinstance(n, int)))
    sampler = GlobalBatchSampler.of(
        dataset,
        data_args,
        per_device_batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world_size=args.world_size,
        rank=args.process_index,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )

    # 3. The model: three parts grafted together, frozen, then what is trained
    set_seed(args.seed)
    model, preprocessor = assemble(
        model_args.model_name_or_path,
        model_args.vision_tower,
        model_args.pretrain_mm_mlp_adapter,
        tokenizer=tokenizer,
        image_token_id=image_token_id(tokenizer),
        dtype=args.dtype,
        bits=model_args.bits,
        attention=model_args.attn_implementation,
    )
    set_seed(args.seed)  # loading draws random numbers, under ZeRO-3 others: adapters begin the same under any stage
    if adapter_args.tune_mm_mlp_adapter:
        model = train_projector_only(model)
    else:
        model = add_adapters(model, *tower_adapters(adapter_args))
    set_recompute(model, args.recompute)
    say(describe(model))

    # 4. What trains it: whatever refuses does so before the run folder is touched
    settings = {
        "model": asdict(model_args) | {"version": template},
        "data": asdict(data_args),
        "adapter": asdict(adapter_args),
        "training": args.to_sanitized_dict() | {"dropout_masks": mask_source(args.device)},
        "preprocessor": preprocessor,
        "global_batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
    facts = {
        "llm": fingerprint(model_args.model_name_or_path),
        "vision_tower": fingerprint(model_args.vision_tower),
        "projector": fingerprint(model_args.pretrain_mm_mlp_adapter or "none"),
        "data": keys_of(dataset),
    }
    trainer = MosLoraTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=Collator.of(data_args, tokenizer, transform, packing=args.packing),
        sampler=sampler,
        facts=facts,
        callbacks=[pause],
    )
    if args.sample_questions:
        samples = read_samples(args.sample_questions, args.sample_image_folder or data_args.image_folder)
        chat_model = ChatModel(model, tokenizer, template, transform)
        limits = {"steps": args.sample_steps, "max_new_tokens": args.sample_max_new_tokens}
        trainer.add_callback(SampleAnswers(samples, chat_model, run, **limits))
    trainer.create_optimizer()

    # 5. The run folder: a new run, or the old one where it stopped
    lock = checkpoint = None
    if main_process:
        if args.resume:
            lock, checkpoint = reopen_run(run, settings, facts, args.allow_change, inputs)
        else:
            lock = open_run(run, overwrite=args.overwrite, inputs=inputs)
        check_space(run, trained_count(model), checkpoints=2 if checkpoint is None else 1)

        def record(run: Path) -> None:
            write_run(run, settings)
            tokenizer.save_pretrained(run / TOKENIZER)

        if args.resume and has_begun(run):
            record(run)
        else:
            with TemporaryDirectory(dir=run, prefix=".", suffix=".staging") as staging:
                report, batch_size = Path(staging) / DATA_REPORT, args.per_device_train_batch_size
                # reads images, and refuses those that cannot be read
                write_report(report, dataset, settings=data_args, tokenizer=tokenizer, batch_size=batch_size)
                begin_run(run, record, report)
    check_shared(run)
    checkpoint = from_rank_0(checkpoint)

    # 6. Train
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    if args.save_strategy == "no":
        say("--save_strategy no: nothing of this run will be saved")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    pause.leave(run)
    say(closing_line(run, trainer.state.global_step))
    if lock is not None:
        lock.release()


def closing_line(run: Path, step: int) -> str:
    if (run / f"checkpoint-{step}").is_dir():
        return f"trained: {run}; next: python scripts/export.py {run} --output_dir MERGED"
    return f"trained: {run}, and nothing was saved of step {step}, its last: there is nothing to export"


if __name__ == "__main__":
    run_script(main)
