#!/usr/bin/env bash
# MoSLoRA in the manner of LLaVA-1.5's LoRA run, on Vicuna-7B-v1.5 and CLIP-L/336: rank 128, alpha 256, the vision tower
# frozen, learning rate 2e-4 and 2e-5 for the projector, LLaVA's prompt format, global batch 128.
#
#   bash scripts/vicuna_7b_moslora.sh                         # 8 GPUs; folders as below and in recipe_defaults.sh
#   GPUS=4 RUN=/data/run bash scripts/vicuna_7b_moslora.sh --save_steps 500
#
# Every variable can be set in the environment, and flags of train_vit_llm.py can follow the script's name (the last
# one wins). The same command resumes an interrupted run.
# Planned, python scripts/plan.py --config scripts/vicuna_7b_moslora.sh --gpu a100-80 --records 665298:
#   fits on 8 × A100 with 79.1 GiB: 18.0 to 21.1 GiB a GPU, 4.3 to 9.8 h for 5,198 steps; --recompute auto: full
set -euo pipefail
source "$(dirname "$0")/recipe_defaults.sh"

LLM=${LLM:-playground/models/vicuna-7b-v1.5}
PROJECTOR=${PROJECTOR:-playground/models/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5/mm_projector.bin}
RUN=${RUN:-playground/runs/vicuna-7b-moslora}
GPUS=${GPUS:-8}

deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 "${CODE}scripts/train_vit_llm.py" \
    --deepspeed "${CODE}zero_configs/zero3.json" \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --pretrain_mm_mlp_adapter "$PROJECTOR" --version vicuna_v1 \
    --data_path "$DATA" --image_folder "$IMAGES" \
    --lora_r 128 --lora_alpha 256 --lora_dropout 0.05 --mixer_init kaiming_uniform --vision_lora_r 0 \
    --learning_rate 2e-4 --mm_projector_lr 2e-5 --per_device_train_batch_size 16 --global_batch_size 128 \
    "${STAGE_2[@]}" --output_dir "$RUN" "$@"
