#!/usr/bin/env bash
# Stage 1 for InternLM2-chat-7B: only the projector, two linear layers between CLIP-L/336 and the LLM, is trained
# on 558K captions; LLM and vision tower are frozen.
#
#   bash scripts/internlm2_7b_pretrain.sh                     # 4 GPUs; folders as below and in recipe_defaults.sh
#   GPUS=8 RUN=/data/run bash scripts/internlm2_7b_pretrain.sh --save_steps 500
#
# Every variable can be set in the environment, and flags of train_vit_llm.py can follow the script's name (the last
# one wins). The same command resumes an interrupted run.
#
# Hyper-parameters are XTuner's for the projector that the paper starts from, xtuner/llava-internlm2-7b-pretrain, the LLM
# in NF4 among them (BITS=16 leaves it in 16 bits); with that one (its .pth file as PROJECTOR of stage 2) this
# stage is not needed. The captions are asked for in the LLM's chat format, as there.
# Planned, python scripts/plan.py --config scripts/internlm2_7b_pretrain.sh --gpu a100-80 --records 558128:
#   fits on 4 × A100 with 79.1 GiB: 31.4 to 35.9 GiB a GPU, 7.2 to 16.5 h for 2,181 steps; --recompute auto: full
set -euo pipefail
DATA=${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-playground/data/LLaVA-Pretrain/images}
source "$(dirname "$0")/recipe_defaults.sh"

LLM=${LLM:-playground/models/internlm2-chat-7b}
RUN=${RUN:-playground/runs/internlm2-7b-pretrain}
GPUS=${GPUS:-4}
BITS=${BITS:-4}

# 2181 steps; the projector is then in $RUN/checkpoint-2181/projector.
deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 "${CODE}scripts/train_vit_llm.py" \
    --deepspeed "${CODE}zero_configs/zero2.json" \
    --tune_mm_mlp_adapter True \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --bits "$BITS" \
    --data_path "$DATA" --image_folder "$IMAGES" --image_aspect_ratio crop --data_order shuffle \
    --learning_rate 1e-3 --per_device_train_batch_size 32 --global_batch_size 256 \
    "${COMMON[@]}" --save_steps 500 --output_dir "$RUN" "$@"
