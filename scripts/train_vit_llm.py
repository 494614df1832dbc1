"""Fine-tune a LLaVA: adapters in LLM and vision tower, full projector; without --vision_tower an LLM.

    deepspeed scripts/train_vit_llm.py --deepspeed zero_configs/zero2.json --bf16 True \\
        --model_name_or_path LLM --vision_tower CLIP --pretrain_mm_mlp_adapter PROJECTOR \\
        --data_path llava_v1_5_mix665k.json --image_folder playground/data --output_dir runs/moslora

Complete calls for published models are in scripts/*.sh. scripts/export.py exports the run.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

from llava_moslora.errors import Refusal, run_script

if __name__ == "__main__":
    run_script(lambda: None)  # a signal is one line also while the next ones are imported

from llava_moslora.devices import use_expandable_segments
from llava_moslora.noise import quiet_libraries, quiet_loading
from llava_moslora.training.command_line import check_places, parse

if __name__ == "__main__":  # --help, a wrong flag or folder are answered here, before the seconds of these imports
    run_script(lambda: check_places(*parse(sys.argv[1:], __doc__)))
    quiet_libraries()
    use_expandable_segments()

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerFast, TrainerState, set_seed

from llava_moslora.config import AUTO, AdapterSettings, DataSettings, ModelSettings
from llava_moslora.data.cache import summary
from llava_moslora.data.collate import Collator
from llava_moslora.data.image_transform import ImageTransform
from llava_moslora.data.prepare import prepare
from llava_moslora.data.report import write_report
from llava_moslora.data.sampler import GlobalBatchSampler
from llava_moslora.data.split import validation_data
from llava_moslora.defect_report import save_report
from llava_moslora.distributed import from_rank_0
from llava_moslora.flags import call_of
from llava_moslora.inference.load import ChatModel
from llava_moslora.models.adapt import add_adapters, parameter_table, train_projector_only
from llava_moslora.models.assemble import assemble, check_parts
from llava_moslora.models.llava import Llava, TextLlm
from llava_moslora.models.llava_folder import name_parts
from llava_moslora.models.llm import longest_text, read_llm_config
from llava_moslora.models.towers import tokens_per_image
from llava_moslora.models.vision import read_image_settings, read_vision_config
from llava_moslora.planning.advice import advice_where_memory_ends
from llava_moslora.planning.check import check_plan, plan_of_training, smallest_memory
from llava_moslora.planning.plan import Plan
from llava_moslora.planning.report import chosen
from llava_moslora.planning.seen import SeenSteps
from llava_moslora.recompute import set_recompute
from llava_moslora.runs.fingerprint import base_fingerprints
from llava_moslora.runs.folder import check_resume, check_shared, check_space, open_run, write_first_files
from llava_moslora.runs.output_dir import check_output
from llava_moslora.runs.record import RunSettings
from llava_moslora.text.templates import recognise_template
from llava_moslora.text.tokenizer import load_tokenizer
from llava_moslora.training import process_group
from llava_moslora.training.arguments import TrainingArguments, input_paths
from llava_moslora.training.callbacks.preemption import Preemption, catch_lost_ranks
from llava_moslora.training.callbacks.sample_answers import Sample, SampleAnswers, read_samples
from llava_moslora.training.deepspeed_config import read_deepspeed_config
from llava_moslora.training.launch import check_launch
from llava_moslora.training.optimizer_state import trained_count
from llava_moslora.training.same_on_ranks import check_same_inputs, check_same_settings, data_read
from llava_moslora.training.text_only import check_text_only
from llava_moslora.training.trainer import MosLoraTrainer
from llava_moslora.training.validate import check


@catch_lost_ranks()
def main() -> None:
    preemption = Preemption()  # handles SIGTERM and SIGINT from here on

    # 1. Read the flags, join the other ranks, and check the flags against each other
    model_settings, data_settings, adapter_settings, training = read_flags()
    text_only = model_settings.text_only
    check_launch(training)
    if training["deepspeed"]:
        process_group.join(timedelta(seconds=training["ddp_timeout"]))
    args = TrainingArguments(**training)
    check_same_settings(args, model_settings, data_settings, adapter_settings)
    check(model_settings, data_settings, adapter_settings, args)
    run, main_process = args.run_folder, args.process_index == 0
    print_once = print if main_process else (lambda *_: None)
    inputs = input_paths(model_settings, data_settings, args, sys.argv[1:])
    if main_process:
        check_output(args, inputs, data_settings)

    # 2. Read configurations and tokenizer, no weights yet
    llm_config = read_llm_config(model_settings.model_name_or_path)
    image_tokens, processor, transform = (0, {}, None) if text_only else read_vision(model_settings, data_settings)
    tokenizer = load_tokenizer(model_settings.model_name_or_path, images=not text_only)
    check_parts(model_settings, tokenizer)
    template = model_settings.version or recognise_template(tokenizer)
    print_once(f"device: {args.device_name}\nconversation template: {template}{'; text only' if text_only else ''}")

    # 3. With --resume: refuse settings and models that differ from the run's; again below, with the data
    model_settings = replace(model_settings, version=template)
    settings = RunSettings(model_settings, data_settings, adapter_settings, args.as_record(), processor,
                           global_batch_size=args.global_batch_size)  # fmt: skip
    fingerprints: dict[str, Any] = base_fingerprints(model_settings)
    check_resume(args, settings, fingerprints)

    # 4. Check and tokenise the data, or find it in --data_cache
    prepare_alike = partial(prepare, tokenizer=tokenizer, template=template, tokens_per_image=image_tokens,
                            longest_text=longest_text(llm_config), patience=args.ddp_timeout)  # fmt: skip
    dataset = prepare_alike(data_settings)
    trained, validation, keys = validation_data(dataset, data_settings, prepare_alike, seed=args.batches["seed"])
    print_once(summary(dataset) if validation is None else f"{summary(dataset)}\n{validation.summary()}")
    sampler = GlobalBatchSampler.of(dataset, data_settings, records=trained, **args.batches)
    planned = cache(partial(make_plan, model_settings, data_settings, adapter_settings, args, dataset, trained,
                            smallest_memory(args.device)))  # fmt: skip
    seen = check_and_decide(planned, args)
    samples = read_samples_of(args, data_settings, tokenizer, template, image_tokens)

    check_same_inputs(settings, fingerprints | data_read(dataset, trained, validation))
    settings.training, fingerprints = args.as_record(), fingerprints | keys  # --recompute auto is decided
    check_resume(args, settings, fingerprints)

    # 5. Load the model, add what is trained, create trainer and optimizer
    model = build_model(model_settings, adapter_settings, args, tokenizer)
    print_once(parameter_table(model))
    collate = Collator.of(data_settings, tokenizer, transform, packing=args.packing)
    trainer = MosLoraTrainer(model, args, train_dataset=dataset, sampler=sampler, data_collator=collate,
                             eval_dataset=validation, facts=fingerprints, callbacks=[preemption, seen])  # fmt: skip
    trainer.add_callback(sample_answers(args, samples, ChatModel(model, tokenizer, template, transform)))
    trainer.create_optimizer()  # before the first file is written: --optim may be refused

    # 6. Lock the run folder and write run.json, tokenizer and data report; --overwrite deletes the old run only now
    lock = checkpoint = None
    if main_process:
        lock, checkpoint = open_run(args, settings, fingerprints, inputs)
        check_space(run, trained_count(model), checkpoints=1 + (checkpoint is None) + (validation is not None))
        write_run(args, settings, tokenizer, dataset, trained, inputs)
    check_shared(run)
    checkpoint = from_rank_0(checkpoint)

    # 7. Train
    print_once(opening_line(args, checkpoint))
    with advice_where_memory_ends(planned):
        trainer.train(None if checkpoint is None else str(checkpoint))
    preemption.refuse_if_interrupted(run)
    print_once(closing_line(run, trainer.state, " --format llm" if text_only else ""))
    if lock is not None:
        lock.release()


def read_flags() -> tuple[ModelSettings, DataSettings, AdapterSettings, dict[str, Any]]:
    """Those of the command line; of a complete LLaVA with its LLM, vision tower and projector."""
    model, data, adapter, training = parse(sys.argv[1:], __doc__)
    model = name_parts(model)
    return model, data, check_text_only(model, data, adapter, training), training


def read_vision(model: ModelSettings, data: DataSettings) -> tuple[int, dict[str, Any], ImageTransform]:
    """Of the vision tower: placeholders per image, image-processor settings, and the transform that they make."""
    image_tokens = tokens_per_image(read_vision_config(model.tower))
    processor = read_image_settings(model.tower)
    return image_tokens, processor, ImageTransform.from_settings(processor, data)


def check_and_decide(planned: Callable[[], Plan | None], args: TrainingArguments) -> SeenSteps:
    """Print the plan's first line or refuse what cannot fit, before anything is loaded, and decide ``--recompute auto``
    for all ranks (``args.recompute``); the callback sets the plan next to the first steps. Only rank 0 plans."""
    plan = planned() if args.process_index == 0 else None
    if args.recompute == AUTO:
        args.recompute = from_rank_0(decide_recompute(plan, args) if args.process_index == 0 else None)
    if plan is not None and args.plan_check:
        print(check_plan(plan))
    return SeenSteps(args.run_folder, None if plan is None or plan.request.stands_for else plan)


def decide_recompute(plan: Plan | None, args: TrainingArguments) -> str:
    """What ``--recompute auto`` is in this training; says so."""
    if args.device.type != "cuda":
        print(f"--recompute auto: none; the memory of a {args.device.type} is not planned")
        return "none"
    if plan is None:  # make_plan has said why
        return "full"
    print(chosen(plan))
    return plan.request.choice.recompute


def make_plan(
    model: ModelSettings, data: DataSettings, adapter: AdapterSettings, args: TrainingArguments, dataset: Dataset,
    trained: np.ndarray | None, memory: int | None,
) -> Plan | None:  # fmt: skip
    """The plan of this training on GPUs with ``memory`` bytes; None on a CPU, and where making it failed."""
    if memory is None:
        return None
    deepspeed = read_deepspeed_config(args.deepspeed) if args.deepspeed else None
    try:
        return plan_of_training(
            model, data, adapter, vars(args), dataset, rows=trained, gpus=args.world_size, device=args.device,
            memory=memory, deepspeed=deepspeed,
        )  # fmt: skip
    except Exception as error:  # a failing plan must not end training
        saved = None if isinstance(error, Refusal) else save_report(error, args.run_folder)
        bug = "" if saved is None else f"; a bug in this package: report it with {saved}"
        print(f"{'--recompute auto: full; ' if args.recompute == AUTO else ''}no plan of the memory: {error}{bug}")
        return None


def build_model(
    model_settings: ModelSettings,
    adapter_settings: AdapterSettings,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerFast,
) -> PeftModel | Llava | TextLlm:
    """The frozen model, with adapters (a PeftModel), or in stage 1 with a trainable projector."""
    if args.process_index > 0:
        quiet_loading()
    set_seed(args.seed)
    model, _ = assemble(model_settings, tokenizer=tokenizer, dtype=args.dtype)
    set_seed(args.seed)  # loading draws random numbers, other ones under ZeRO-3: adapters start the same in any stage
    if adapter_settings.tune_mm_mlp_adapter:
        model = train_projector_only(model)
    else:
        model = add_adapters(model, adapter_settings)
    set_recompute(model, args.recompute or "none")
    return model


def write_run(
    args: TrainingArguments, settings: RunSettings, tokenizer: PreTrainedTokenizerFast, dataset: Dataset,
    trained: np.ndarray | None, inputs: list[tuple[str, Path]],
) -> None:  # fmt: skip
    """run.json, the tokenizer and the report of the data that is trained on."""
    report = partial(write_report, dataset=dataset, settings=settings.data, tokenizer=tokenizer, rows=trained,
                     batch_size=args.per_device_train_batch_size)  # fmt: skip
    write_first_files(args, settings, tokenizer, report, inputs)


def read_samples_of(
    args: TrainingArguments, data: DataSettings, tokenizer: PreTrainedTokenizerFast, template: str, image_tokens: int
) -> list[Sample]:
    if not args.sample_questions:
        return []
    folder = args.sample_image_folder or data.image_folder
    asked = replace(data, data_path=[args.sample_questions], image_folder=folder, data_weights=[])
    return read_samples(asked, tokenizer=tokenizer, template=template, tokens_per_image=image_tokens)


def sample_answers(args: TrainingArguments, samples: list[Sample], chat_model: ChatModel) -> SampleAnswers:
    limits = {"steps": args.sample_steps, "max_new_tokens": args.sample_max_new_tokens}
    return SampleAnswers(samples, chat_model, args.run_folder, **limits)


def opening_line(args: TrainingArguments, checkpoint: Path | None) -> str:
    if args.save_strategy == "no":
        return "--save_strategy no: nothing of this run will be saved"
    return f"training into {args.run_folder}" if checkpoint is None else f"resuming from {checkpoint}"


def closing_line(run: Path, state: TrainerState, form: str) -> str:
    trained, best = f"trained: {run}", state.best_global_step
    if best:
        trained += f"; best of its checkpoints: checkpoint-{best}, {state.best_metric:.4f}"
    if best or (run / f"checkpoint-{state.global_step}").is_dir():
        return f"{trained}; next: {call_of('export', run)} --output_dir MERGED{form}"
    return f"{trained}; its last step, {state.global_step}, was not saved: there is nothing to export"


if __name__ == "__main__":
    run_script(main)
