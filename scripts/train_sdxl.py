"""Teach Stable Diffusion XL a subject from a few pictures: LoRA or MoSLoRA adapters in its UNet (paper, section 4.3).

    deepspeed --num_gpus 1 scripts/train_sdxl.py --deepspeed zero_configs/zero2.json --bf16 True \\
        --model_name_or_path stable-diffusion-xl-base-1.0 --image_folder pictures/cat \\
        --prompt "a photo of ikat cat" --learning_rate 1e-4 --max_steps 500 --output_dir runs/cat

scripts/sdxl_cat.sh has the settings of section 4.3 and, where that is silent, of its authors' script. scripts/export.py
--format diffusers makes the file that diffusers and ComfyUI load. Needs diffusers: pip install
'llava_moslora[diffusion]'.
"""

import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from llava_moslora.errors import run_script

if __name__ == "__main__":
    run_script(lambda: None)  # a signal is one line also while the next ones are imported

from llava_moslora.devices import use_expandable_segments
from llava_moslora.diffusion.command_line import parse
from llava_moslora.noise import quiet_libraries

if __name__ == "__main__":  # --help and a wrong flag are answered here, before the seconds that these imports take
    run_script(lambda: parse(sys.argv[1:], __doc__))
    quiet_libraries()
    use_expandable_segments()

from transformers import set_seed

from llava_moslora.config import ModelSettings
from llava_moslora.diffusion.batches import CLASS, SUBJECT, Pictures
from llava_moslora.diffusion.encode import encode_once
from llava_moslora.diffusion.model import add_adapters, build_model, set_recompute
from llava_moslora.diffusion.parts import open_folder, require_diffusers, whole_weights
from llava_moslora.diffusion.report import write_report
from llava_moslora.diffusion.subjects import find_pictures
from llava_moslora.diffusion.trainer import SdxlTrainer
from llava_moslora.distributed import from_rank_0
from llava_moslora.flags import call_of
from llava_moslora.models.adapt import parameter_table
from llava_moslora.runs.folder import check_resume, check_shared, check_space, open_run, write_first_files
from llava_moslora.runs.output_dir import check_output
from llava_moslora.runs.record import SDXL, RunSettings
from llava_moslora.training import process_group
from llava_moslora.training.arguments import TrainingArguments
from llava_moslora.training.callbacks.preemption import Preemption, catch_lost_ranks
from llava_moslora.training.launch import check_launch
from llava_moslora.training.optimizer_state import trained_count
from llava_moslora.training.same_on_ranks import check_same_inputs, check_same_settings
from llava_moslora.training.validate import check_trainer


@catch_lost_ranks()
def main() -> None:
    preemption = Preemption()  # handles SIGTERM and SIGINT from here on

    # 1. Read the flags, join the other ranks, and check the flags against each other
    model_settings, data, adapter, training = parse(sys.argv[1:], __doc__)
    require_diffusers()
    check_launch(training, "scripts/train_sdxl.py")
    if training["deepspeed"]:
        process_group.join(timedelta(seconds=training["ddp_timeout"]))
    args = TrainingArguments(**training)
    check_same_settings(args, model_settings, data, adapter)
    check_trainer(ModelSettings(model_settings.model_name_or_path), args)
    run, main_process = args.run_folder, args.process_index == 0
    print_once = print if main_process else (lambda *_: None)

    # 2. Find the model's parts and the pictures
    folder = open_folder(model_settings.model_name_or_path, model_settings.vae)
    pictures, others = find_pictures(data.image_folder, "--image_folder")
    sets = {SUBJECT: pictures}
    if data.class_image_folder is not None:
        sets[CLASS], _ = find_pictures(data.class_image_folder, "--class_image_folder")
    inputs = [(flag, Path(path)) for flag, path in {
        "--model_name_or_path": model_settings.model_name_or_path, "--vae": model_settings.vae,
        "--image_folder": data.image_folder, "--class_image_folder": data.class_image_folder,
        "--deepspeed": args.deepspeed,
    }.items() if path]  # fmt: skip
    print_once(f"device: {args.device_name}\n{len(pictures)} pictures, {data.prompt!r}")
    if others:
        print_once(f"not pictures, not used: {', '.join(others)}")

    # 3. Refuse inputs that differ between ranks; with --resume, settings and inputs that differ from the run's
    groups: dict[str, Any] = {"model": model_settings, "data": data, "adapter": adapter}  # classes of this kind of run
    settings = RunSettings(**groups, training=args.as_record(), preprocessor={},
                           global_batch_size=args.global_batch_size, kind=SDXL)  # fmt: skip
    contents = {name: sorted(picture.content for picture in some) for name, some in sets.items()}
    fingerprints = folder.fingerprints() | {"pictures": contents}
    check_same_inputs(settings, fingerprints | {"records": len(pictures)})
    if main_process:
        check_output(args, inputs, data)
        check_resume(args, settings, fingerprints)

    # 4. Compute latents and text embeddings once, free VAE and text encoders. Load the UNet
    seed = args.batches["seed"]
    with whole_weights(args.hf_deepspeed_config if args.deepspeed else None):
        encoded = encode_once(folder, data, sets, seed, args.device, embed=not adapter.train_text_encoder)
        model = build_model(folder, adapter, args.dtype, preserves_prior=CLASS in sets)

    # 5. Add the adapters, create trainer and optimizer
    set_seed(args.seed)  # loading draws random numbers: adapters start the same under every ZeRO stage
    model = add_adapters(model, adapter)
    set_recompute(model, args.recompute or "none")
    print_once(parameter_table(model))
    dataset = Pictures(pictures, encoded, seed, model.scheduler.config.num_train_timesteps)
    trainer = SdxlTrainer(model=model, args=args, train_dataset=dataset, sampler=dataset.sampler(**args.batches),
                          facts=fingerprints, data_collator=dataset.collate, callbacks=[preemption])  # fmt: skip
    trainer.create_optimizer()  # before the first file is written: --optim may be refused

    # 6. Lock the run folder and write its first files; --overwrite deletes the old run only now
    lock = checkpoint = None
    if main_process:
        lock, checkpoint = open_run(args, settings, fingerprints, inputs)
        check_space(run, trained_count(model), checkpoints=1 + (checkpoint is None))
        write_first_files(args, settings, None, partial(write_report, sets=sets, encoded=encoded, data=data), inputs)
    check_shared(run)
    checkpoint = from_rank_0(checkpoint)

    # 7. Train
    print_once(f"training into {run}" if checkpoint is None else f"resuming from {checkpoint}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    preemption.refuse_if_interrupted(run)
    print_once(f"trained: {run}; next: {call_of('export', run)} --format diffusers --output_dir LORA")
    if lock is not None:
        lock.release()


if __name__ == "__main__":
    run_script(main)
