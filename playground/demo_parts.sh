#!/usr/bin/env bash
# How the two checked-in parts of the demo were made: a small CLIP tower, and a projector pretrained in stage 1.
# Run it as `make demo-parts`; it replaces playground/clip-tiny and playground/projector-tiny.
set -euo pipefail
cd "$(dirname "$0")/.."

VQA=playground/data/easy_vqa LLM=playground/models/smollm2-135m-instruct RUN=playground/runs/projector-tiny

bash playground/demo_inputs.sh
python playground/train_clip.py --data $VQA --out playground/clip-tiny

# Stage 1: the projector alone, on captions, with the package's own entry script
OMP_NUM_THREADS=1 deepspeed --num_accelerators 2 --master_addr 127.0.0.1 scripts/train_vit_llm.py \
  --deepspeed zero_configs/zero2.json \
  --model_name_or_path $LLM --vision_tower playground/clip-tiny --version plain --tune_mm_mlp_adapter True \
  --data_path $VQA/captions.json --image_folder $VQA/images --data_order shuffle \
  --learning_rate 2e-3 --per_device_train_batch_size 8 --num_train_epochs 2 \
  --bf16 True --seed 1024 \
  --output_dir $RUN --overwrite True
python playground/keep_projector.py $RUN playground/projector-tiny
