# What the recipes next to this file share; each sources it. Every variable can be set from outside.
# In a checkout all paths are relative to it. In an installed package the code is there, and the rest where you are.
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/
if [ -f "${CODE}setup.cfg" ]; then cd "$CODE"; CODE=; fi

TOWER=${TOWER:-playground/models/clip-vit-large-patch14-336}
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-playground/data}

# Both stages: schedule, precision, memory, loading, and that the same command resumes an interrupted run. What backward
# recomputes is chosen by the GPU's memory, all of it. If that is short all the same, beside another program for example:
# --recompute full, also for a run that is resumed.
COMMON=(
    --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 --max_grad_norm 1 --num_train_epochs 1 --seed 1024
    --bf16 True --recompute auto --model_max_length 2048 --dataloader_num_workers 4 --preprocessing_num_workers 16
    --save_total_limit 2 --resume True --logging_steps 10  # a log makes the host wait for the GPU
)
# Stage 2, on the 665K records of LLaVA-1.5.
STAGE_2=("${COMMON[@]}" --image_aspect_ratio pad --data_order modality_length --save_steps 1000)
