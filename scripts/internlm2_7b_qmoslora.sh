#!/usr/bin/env bash
# QMoSLoRA, mixer from Kaiming's uniform distribution, on InternLM2-chat-7B in NF4 and CLIP-L/336.
# Hyper-parameters: Table 8 of the MoSLoRA paper, column "InternLM2+ViT".
#
#   bash scripts/internlm2_7b_qmoslora.sh                  # parts and data where the variables below say, 4 GPUs
#   GPUS=2 RUN=/data/run bash scripts/internlm2_7b_qmoslora.sh --save_steps 500
#
# Every variable below can be set from outside, and more flags of train_vit_llm.py follow the script's name (the last
# one wins). The same command goes on where an interrupted run stopped. Paths are relative to the repository.
#
# The authors' published config file differs from their paper: learning rate 2e-4, the LM head adapted too,
# and plain LoRA, without a mixer, in the vision tower.
# HYPER=paper (default) takes the paper's values, HYPER=authors the file's. The file's run also averages the loss
# over each micro-batch instead of over all trained tokens of the global batch: --loss_average micro_batch.
set -euo pipefail
cd "$(dirname "$0")/.."

LLM=${LLM:-playground/models/internlm2-chat-7b}
TOWER=${TOWER:-playground/models/clip-vit-large-patch14-336}
PROJECTOR=${PROJECTOR:-playground/runs/internlm2-7b-pretrain/checkpoint-2181/projector}
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-playground/data}
RUN=${RUN:-playground/runs/internlm2-7b-qmoslora}
GPUS=${GPUS:-4}
HYPER=${HYPER:-paper}

case "$HYPER" in
  paper)   RATE=2e-5 HEAD="" VISION="--vision_mixer_init kaiming_uniform" ;;
  authors) RATE=2e-4 HEAD=lm_head VISION="--vision_mixer_init identity --vision_train_mixer False" ;;
  *) echo "error: HYPER=$HYPER; fix: HYPER=paper or HYPER=authors" >&2; exit 2 ;;
esac

# Global batch 64 on any number of GPUs that divides 4; on the paper's four: 16 records per GPU.
deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 scripts/train_vit_llm.py \
    --deepspeed zero_configs/zero2.json \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --pretrain_mm_mlp_adapter "$PROJECTOR" --bits 4 \
    --data_path "$DATA" --image_folder "$IMAGES" --model_max_length 2048 --image_aspect_ratio pad \
    --data_order modality_length \
    --lora_r 512 --lora_alpha 256 --lora_dropout 0.05 --mixer_init kaiming_uniform \
    --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj $HEAD \
    --vision_lora_r 64 --vision_lora_alpha 16 --vision_lora_dropout 0.05 $VISION \
    --learning_rate $RATE --per_device_train_batch_size 16 --gradient_accumulation_steps $((4 / GPUS)) \
    --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 --max_grad_norm 1 \
    --num_train_epochs 1 --bf16 True --recompute full --seed 1024 \
    --dataloader_num_workers 4 --preprocessing_num_workers 16 --save_steps 1000 --save_total_limit 2 \
    --output_dir "$RUN" --resume True "$@"
