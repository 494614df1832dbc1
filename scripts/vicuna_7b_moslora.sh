#!/usr/bin/env bash
# MoSLoRA in the manner of LLaVA-1.5's LoRA run, on Vicuna-7B-v1.5 and CLIP-L/336: rank 128, alpha 256, the vision tower
# frozen, learning rate 2e-4 and 2e-5 for the projector, LLaVA's prompt format, global batch 128.
#
#   bash scripts/vicuna_7b_moslora.sh                  # parts and data where the variables below say, 8 GPUs
#   GPUS=4 RUN=/data/run bash scripts/vicuna_7b_moslora.sh --save_steps 500
#
# Every variable below can be set from outside, and more flags of train_vit_llm.py follow the script's name (the last
# one wins). The same command goes on where an interrupted run stopped. Paths are relative to the repository.
set -euo pipefail
cd "$(dirname "$0")/.."

LLM=${LLM:-playground/models/vicuna-7b-v1.5}
TOWER=${TOWER:-playground/models/clip-vit-large-patch14-336}
PROJECTOR=${PROJECTOR:-playground/models/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5/mm_projector.bin}
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-playground/data}
RUN=${RUN:-playground/runs/vicuna-7b-moslora}
GPUS=${GPUS:-8}

# Global batch 128 on any number of GPUs that divides 8: 16 records per GPU on eight of them.
deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 scripts/train_vit_llm.py \
    --deepspeed zero_configs/zero3.json \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --pretrain_mm_mlp_adapter "$PROJECTOR" --version vicuna_v1 \
    --data_path "$DATA" --image_folder "$IMAGES" --model_max_length 2048 --image_aspect_ratio pad \
    --data_order modality_length \
    --lora_r 128 --lora_alpha 256 --lora_dropout 0.05 --mixer_init kaiming_uniform --vision_lora_r 0 \
    --learning_rate 2e-4 --mm_projector_lr 2e-5 \
    --per_device_train_batch_size 16 --gradient_accumulation_steps $((8 / GPUS)) \
    --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 --max_grad_norm 1 \
    --num_train_epochs 1 --bf16 True --recompute full --seed 1024 \
    --dataloader_num_workers 4 --preprocessing_num_workers 16 --save_steps 1000 --save_total_limit 2 \
    --output_dir "$RUN" --resume True "$@"
