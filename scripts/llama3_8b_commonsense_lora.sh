#!/usr/bin/env bash
# LoRA (the baseline: a frozen identity mixer) on LLaMA-3-8B-Instruct, text-only, on commonsense_170k: the paper's Table 4.
# Hyper-parameters: Table 7 of the MoSLoRA paper, column "LoRA"; what the table does not say (cutoff, schedule, warmup,
# loss on the whole prompt) is from the authors' script.
#
#   bash scripts/llama3_8b_commonsense_lora.sh                  # 1 GPU; folders as below
#   LR=3e-4 SEED=2 RUN=/data/run bash scripts/llama3_8b_commonsense_lora.sh
#
# The table says learning rate 3e-5, the authors' script 3e-4 (LR=3e-4). They report one run, kept the best checkpoint of
# a small validation set and say that the same settings sometimes end much lower: repeat it with several SEEDs.
# commonsense_170k.json is LLM-Adapters' ft-training_set file.
#
# Every variable can be set in the environment, and flags of train_vit_llm.py can follow the script's name (the last
# one wins). The same command resumes an interrupted run. To average the loss per micro-batch, as the reference does, add
# --loss_average micro_batch. Afterwards: python scripts/evaluate_commonsense.py RUN --data DATASET
# Planned, python scripts/plan.py --config scripts/llama3_8b_commonsense_lora.sh --gpu a100-80 --records 170420:
#   fits on 1 × A100 with 79.1 GiB: 19.4 to 22.1 GiB a GPU, 8.0 to 18.2 h for 31,956 steps
set -euo pipefail
source "$(dirname "$0")/recipe_defaults.sh"

LLM=${LLM:-playground/models/Meta-Llama-3-8B-Instruct}
TEXT=${TEXT:-playground/data/commonsense_170k.json}
RUN=${RUN:-playground/runs/llama3-8b-commonsense-lora}
LR=${LR:-3e-5}
SEED=${SEED:-1024}
GPUS=${GPUS:-1}

# As the authors: 4 records per GPU, 4 accumulated.
deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 "${CODE}scripts/train_vit_llm.py" \
    --deepspeed "${CODE}zero_configs/zero1.json" \
    --model_name_or_path "$LLM" --data_path "$TEXT" --version llm_adapters --train_on_prompt True \
    --lora_r 16 --lora_alpha 32 --lora_dropout 0.05 --lora_target_modules q_proj k_proj v_proj up_proj down_proj \
    --mixer_init identity --train_mixer False \
    "${COMMON[@]}" --model_max_length 256 --data_order shuffle --recompute none \
    --num_train_epochs 3 --lr_scheduler_type linear --warmup_steps 100 --seed "$SEED" \
    --learning_rate "$LR" --per_device_train_batch_size 4 --global_batch_size 16 \
    --save_steps 1000 --output_dir "$RUN" "$@"
