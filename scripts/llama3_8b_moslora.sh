#!/usr/bin/env bash
# MoSLoRA, kaiming_uniform mixer init, on LLaMA-3-8B-Instruct and CLIP-L/336.
# Hyper-parameters: Table 8 of the MoSLoRA paper, column "LLaMA-3+ViT"; what the table does not say (dropout,
# schedule, warm-up, clipping, weight decay, seed) is from the authors' configuration file and start script.
#
#   bash scripts/llama3_8b_moslora.sh                         # 4 GPUs; folders as below and in recipe_defaults.sh
#   GPUS=8 RUN=/data/run bash scripts/llama3_8b_moslora.sh --save_steps 500
#
# Every variable can be set in the environment, and flags of train_vit_llm.py can follow the script's name (the last
# one wins). The same command resumes an interrupted run.
#
# PROJECTOR is stage 1's (llama3_8b_pretrain.sh); the paper's is XTuner's, the .pth of xtuner/llava-llama-3-8b-pretrain.
# As XTuner, which averages the loss over each micro-batch and sorts 50 global batches by length together:
# --loss_average micro_batch --data_group 50. What else differs: docs/training.md, "Paper, authors' code, here".
# Planned, python scripts/plan.py --config scripts/llama3_8b_moslora.sh --gpu a100-80 --records 665298:
#   fits on 4 × A100 with 79.1 GiB: 68.2 to 76.9 GiB a GPU, 5.9 to 13.5 h for 10,396 steps; --recompute auto: selective
set -euo pipefail
source "$(dirname "$0")/recipe_defaults.sh"

LLM=${LLM:-playground/models/Meta-Llama-3-8B-Instruct}
PROJECTOR=${PROJECTOR:-playground/runs/llama3-8b-pretrain/checkpoint-2181/projector}
RUN=${RUN:-playground/runs/llama3-8b-moslora}
GPUS=${GPUS:-4}

# On the paper's four GPUs: 8 records per GPU, 2 accumulated.
deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 "${CODE}scripts/train_vit_llm.py" \
    --deepspeed "${CODE}zero_configs/zero2.json" \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --data_path "$DATA" --image_folder "$IMAGES" \
    --lora_r 64 --lora_alpha 128 --lora_dropout 0.05 \
    --vision_lora_r 64 --vision_lora_alpha 16 --vision_lora_dropout 0.05 \
    --mixer_init kaiming_uniform \
    --learning_rate 2e-5 --per_device_train_batch_size 8 --global_batch_size 64 \
    "${STAGE_2[@]}" --output_dir "$RUN" "$@"
