#!/usr/bin/env bash
# MoSLoRA, mixer from Kaiming's uniform distribution, on LLaMA-3-8B-Instruct and CLIP-L/336.
# Hyper-parameters: Table 8 of the MoSLoRA paper, column "LLaMA-3+ViT".
#
#   bash scripts/llama3_8b_moslora.sh                  # parts and data where the variables below say, 4 GPUs
#   GPUS=8 RUN=/data/run bash scripts/llama3_8b_moslora.sh --save_steps 500
#
# With 80 GB a GPU add --recompute selective: 1.3 times as fast as full recomputation (8 records, one H100).
#
# Every variable below can be set from outside, and more flags of train_vit_llm.py follow the script's name (the last
# one wins). The same command goes on where an interrupted run stopped. Paths are relative to the repository.
#
# The reference averages the loss over each micro-batch, here over all trained tokens of the global batch; for the
# reference's way add --loss_average micro_batch.
set -euo pipefail
cd "$(dirname "$0")/.."

LLM=${LLM:-playground/models/Meta-Llama-3-8B-Instruct}
TOWER=${TOWER:-playground/models/clip-vit-large-patch14-336}
PROJECTOR=${PROJECTOR:-playground/runs/llama3-8b-pretrain/checkpoint-2181/projector}
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-playground/data}
RUN=${RUN:-playground/runs/llama3-8b-moslora}
GPUS=${GPUS:-4}

# Global batch 64 on any number of GPUs that divides 8; on the paper's four: 8 records per GPU, 2 accumulated.
deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 scripts/train_vit_llm.py \
    --deepspeed zero_configs/zero2.json \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --data_path "$DATA" --image_folder "$IMAGES" --model_max_length 2048 --image_aspect_ratio pad \
    --data_order modality_length \
    --lora_r 64 --lora_alpha 128 --lora_dropout 0.05 \
    --vision_lora_r 64 --vision_lora_alpha 16 --vision_lora_dropout 0.05 \
    --mixer_init kaiming_uniform \
    --learning_rate 2e-5 --per_device_train_batch_size 8 --gradient_accumulation_steps $((8 / GPUS)) \
    --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 --max_grad_norm 1 \
    --num_train_epochs 1 --bf16 True --recompute full --seed 1024 \
    --dataloader_num_workers 4 --preprocessing_num_workers 16 --save_steps 1000 --save_total_limit 2 \
    --output_dir "$RUN" --resume True "$@"
