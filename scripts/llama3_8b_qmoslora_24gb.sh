#!/usr/bin/env bash
# QMoSLoRA on LLaMA-3-8B-Instruct and CLIP-L/336 on one GPU with 24 GB: the LLM in NF4, everything else as
# in llama3_8b_moslora.sh, also what is said there of PROJECTOR and of XTuner.
#
#   bash scripts/llama3_8b_qmoslora_24gb.sh
#
# Measured with random weights on an H100: 17.3 GiB reserved at most, with 8 records of 2,048 tokens at a time
# (python benchmarks/train.py --rows zero1+full+4bit). If memory is still short, for example on a GPU that also
# drives a display: --per_device_train_batch_size 2, or --deepspeed zero_configs/zero2_offload.json.
#
# Every variable can be set in the environment, and flags of train_vit_llm.py can follow the script's name (the last
# one wins). The same command resumes an interrupted run.
# Planned, python scripts/plan.py --config scripts/llama3_8b_qmoslora_24gb.sh --gpu rtx4090 --records 665298:
#   fits on 1 × RTX 4090 with 23.5 GiB: 16.8 to 19.2 GiB a GPU, 68.4 to 156.2 h for 10,396 steps
set -euo pipefail
source "$(dirname "$0")/recipe_defaults.sh"

LLM=${LLM:-playground/models/Meta-Llama-3-8B-Instruct}
PROJECTOR=${PROJECTOR:-playground/runs/llama3-8b-pretrain/checkpoint-2181/projector}
RUN=${RUN:-playground/runs/llama3-8b-qmoslora}

# Global batch 64, as in the paper: 4 records at a time, 16 times. ZeRO-1 on one GPU partitions nothing, but keeps the
# float32 master weights of the adapters, at a fraction of the launches of ZeRO-2. --recompute full, not auto: nothing faster
# fits 24 GB.
deepspeed --num_gpus 1 --master_addr 127.0.0.1 "${CODE}scripts/train_vit_llm.py" \
    --deepspeed "${CODE}zero_configs/zero1.json" \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --pretrain_mm_mlp_adapter "$PROJECTOR" --bits 4 \
    --data_path "$DATA" --image_folder "$IMAGES" \
    --lora_r 64 --lora_alpha 128 --lora_dropout 0.05 \
    --vision_lora_r 64 --vision_lora_alpha 16 --vision_lora_dropout 0.05 \
    --mixer_init kaiming_uniform \
    --learning_rate 2e-5 --per_device_train_batch_size 4 --global_batch_size 64 \
    "${STAGE_2[@]}" --recompute full --output_dir "$RUN" "$@"
