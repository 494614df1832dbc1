#!/usr/bin/env bash
# QMoSLoRA, orthogonal mixer init, on InternLM2-chat-7B in NF4 and CLIP-L/336.
# Hyper-parameters: Table 8 of the MoSLoRA paper, column "InternLM2+ViT"; what the table does not say (dropout,
# schedule, warm-up, clipping, weight decay, seed) is from the authors' configuration file and start script.
#
#   bash scripts/internlm2_7b_qmoslora_orthogonal.sh          # 4 GPUs; folders as below and in recipe_defaults.sh
#   GPUS=2 RUN=/data/run bash scripts/internlm2_7b_qmoslora_orthogonal.sh --save_steps 500
#
# Every variable can be set in the environment, and flags of train_vit_llm.py can follow the script's name (the last
# one wins). The same command resumes an interrupted run.
#
# HYPER=paper (default) takes the paper's values, HYPER=authors those of the authors' configuration file: learning
# rate 2e-4, the LM head adapted too, and plain LoRA, without a mixer, in the vision tower. Their start script starts
# two processes, a global batch of 32: add GPUS=2 and --global_batch_size 32.
# InternLM2 has one linear for q, k and v, which therefore share one A and one W there; here each has its own, also
# with HYPER=authors: 1,401M trained parameters in the LLM's layers, there 1,250M.
# PROJECTOR is stage 1's (internlm2_7b_pretrain.sh); the paper's is XTuner's, the .pth of
# xtuner/llava-internlm2-7b-pretrain.
# As XTuner, which averages the loss over each micro-batch and sorts 50 global batches by length together:
# --loss_average micro_batch --data_group 50. What else differs: docs/training.md, "Paper, authors' code, here".
# Planned, python scripts/plan.py --config scripts/internlm2_7b_qmoslora_orthogonal.sh --gpu a100-80 --records 665298:
#   fits on 4 × A100 with 79.1 GiB: 26.3 to 30.3 GiB a GPU, 11.2 to 25.5 h for 10,396 steps; --recompute auto: full
set -euo pipefail
source "$(dirname "$0")/recipe_defaults.sh"

LLM=${LLM:-playground/models/internlm2-chat-7b}
PROJECTOR=${PROJECTOR:-playground/runs/internlm2-7b-pretrain/checkpoint-2181/projector}
RUN=${RUN:-playground/runs/internlm2-7b-qmoslora-orthogonal}
GPUS=${GPUS:-4}
HYPER=${HYPER:-paper}

case "$HYPER" in
  paper)   RATE=2e-5 HEAD="" VISION="--vision_mixer_init orthogonal" ;;
  authors) RATE=2e-4 HEAD=lm_head VISION="--vision_mixer_init identity --vision_train_mixer False" ;;
  *) echo "error: HYPER=$HYPER; fix: HYPER=paper or HYPER=authors" >&2; exit 2 ;;
esac

# On the paper's four GPUs: 16 records per GPU, none accumulated.
deepspeed --num_gpus "$GPUS" --master_addr 127.0.0.1 "${CODE}scripts/train_vit_llm.py" \
    --deepspeed "${CODE}zero_configs/zero2.json" \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --pretrain_mm_mlp_adapter "$PROJECTOR" --bits 4 \
    --data_path "$DATA" --image_folder "$IMAGES" \
    --lora_r 512 --lora_alpha 256 --lora_dropout 0.05 --mixer_init orthogonal \
    --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj $HEAD \
    --vision_lora_r 64 --vision_lora_alpha 16 --vision_lora_dropout 0.05 $VISION \
    --learning_rate $RATE --per_device_train_batch_size 16 --global_batch_size 64 \
    "${STAGE_2[@]}" --output_dir "$RUN" "$@"
