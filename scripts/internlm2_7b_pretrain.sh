#!/usr/bin/env bash
# Stage 1 for InternLM2-chat-7B: the projector alone,
# two linears between CLIP-L/336 and the LLM are trained on 558K captions, both towers frozen.
#
#   bash scripts/internlm2_7b_pretrain.sh                  # parts and data where the variables below say, 4 GPUs
#   GPUS=8 RUN=/data/run bash scripts/internlm2_7b_pretrain.sh --save_steps 500
#
# Every variable below can be set from outside, and more flags of train_vit_llm.py follow the script's name (the last
# one wins). The same command goes on where an interrupted run stopped. Paths are relative to the repository.
#
# Hyper-parameters are XTuner's for the projector that the paper starts from, the LLM in NF4 among them (BITS=16 keeps
# it whole). The captions are asked for in the LLM's chat format, as there.
set -euo pipefail
cd "$(dirname "$0")/.."

LLM=${LLM:-playground/models/internlm2-chat-7b}
TOWER=${TOWER:-playground/models/clip-vit-large-patch14-336}
DATA=${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-playground/data/LLaVA-Pretrain/images}
RUN=${RUN:-playground/runs/internlm2-7b-pretrain}
GPUS=${GPUS:-4}
BITS=${BITS:-4}

# Global batch 256 on any number of GPUs that divides 8: 32 records per GPU on eight of them. 2181 steps; the projector
# is then in $RUN/checkpoint-2181/projector.
deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 scripts/train_vit_llm.py \
    --deepspeed zero_configs/zero2.json \
    --tune_mm_mlp_adapter True \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --bits "$BITS" \
    --data_path "$DATA" --image_folder "$IMAGES" --model_max_length 2048 --image_aspect_ratio crop \
    --data_order shuffle \
    --learning_rate 1e-3 --per_device_train_batch_size 32 --gradient_accumulation_steps $((8 / GPUS)) \
    --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 --max_grad_norm 1 \
    --num_train_epochs 1 --bf16 True --recompute full --seed 1024 \
    --dataloader_num_workers 4 --preprocessing_num_workers 16 --save_steps 500 --save_total_limit 2 \
    --output_dir "$RUN" --resume True "$@"
