#!/usr/bin/env bash
# MoSLoRA, orthogonal mixers, on Stable Diffusion XL: a subject from its pictures (section 4.3 of the paper).
#
#   bash scripts/sdxl_cat.sh                                      # one GPU; folders as below
#   RUN=runs/cat-lora bash scripts/sdxl_cat.sh --mixer_init identity --train_mixer False     # LoRA, to compare with
#   PICTURES=pictures/can PROMPT="a photo of sks can" bash scripts/sdxl_cat.sh
#
# Every variable can be set in the environment, and flags of train_sdxl.py can follow the script's name (the last wins).
# The same command resumes an interrupted run. Needs diffusers: pip install -e '.[diffusion]'. If the GPU's memory is not
# enough, add --recompute full.
#
# From section 4.3: orthogonal mixers, learning rate 1e-4, batches of four, 500 steps; its images are drawn in 50 steps.
# Rank, alpha, schedule, weight decay, clipping, size, crop and seed are those of the authors' script, except:
# - Mixers: the published code has kaiming_uniform: add --mixer_init kaiming_uniform for that.
# - bf16 with float32 master weights instead of fp16 with float32 adapters; --fp16 True --bf16 False for that.
# - A global batch is always four pictures. There, five pictures made batches of four and one in turn.
# - Text embeddings are computed in float32, noise is added in float32, and sizes are not rounded.
# - Noise and timesteps depend on seed, step and position alone: LoRA and MoSLoRA see the same ones.
set -euo pipefail
CODE=$(cd "$(dirname "$0")/.." && pwd)/
if [ -f "${CODE}setup.cfg" ]; then cd "$CODE"; CODE=; fi

SDXL=${SDXL:-playground/models/stable-diffusion-xl-base-1.0}
VAE=${VAE:-playground/models/sdxl-vae-fp16-fix}
PICTURES=${PICTURES:-playground/data/dreambooth/dataset/cat}
PROMPT=${PROMPT:-a photo of ikat cat}
RUN=${RUN:-playground/runs/sdxl-cat}
GPUS=${GPUS:-1}

deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 "${CODE}scripts/train_sdxl.py" \
    --deepspeed "${CODE}zero_configs/zero2.json" --bf16 True \
    --model_name_or_path "$SDXL" --vae "$VAE" --image_folder "$PICTURES" --prompt "$PROMPT" \
    --resolution 1024 --resampling bilinear \
    --lora_r 4 --lora_alpha 4 --lora_dropout 0 --init_lora_weights gaussian --mixer_init orthogonal \
    --per_device_train_batch_size 1 --global_batch_size 4 --max_steps 500 \
    --learning_rate 1e-4 --lr_scheduler_type constant --warmup_steps 0 --weight_decay 1e-4 --max_grad_norm 1 \
    --seed 0 --save_steps 100 --save_total_limit 2 --resume True --output_dir "$RUN" "$@"
