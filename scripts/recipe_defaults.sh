# Settings shared by the recipes next to this file; each sources it. Every variable can be set in the environment.
# In a checkout all paths are relative to it. In an installed package, paths other than the code's are relative to the
# current directory.
CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/
if [ -f "${CODE}setup.cfg" ]; then cd "$CODE"; CODE=; fi

TOWER=${TOWER:-playground/models/clip-vit-large-patch14-336}
DATA=${DATA:-playground/data/llava_v1_5_mix665k.json}
IMAGES=${IMAGES:-playground/data}

# Both stages: schedule, precision, memory, loading, and resuming by the same command. --recompute auto assumes that all
# of the GPU's memory is free. If it is not, because of another program for example: --recompute full, also for a resumed
# run.
COMMON=(
    --lr_scheduler_type cosine --warmup_steps 0.03 --weight_decay 0 --max_grad_norm 1 --num_train_epochs 1 --seed 1024
    --bf16 True --recompute auto --model_max_length 2048 --dataloader_num_workers 4 --preprocessing_num_workers 16
    --save_total_limit 2 --resume True --logging_steps 10  # a log makes the host wait for the GPU
)
# Stage 2, on the 665K records of LLaVA-1.5.
STAGE_2=("${COMMON[@]}" --image_aspect_ratio pad --data_order modality_length --save_steps 1000)
