#!/usr/bin/env bash
# MoSLoRA on LLaMA-3-8B-Instruct and CLIP-L/336 on two hosts with 4 GPUs each: values as in
# llama3_8b_moslora.sh, global batch 64 too, and what is said there of PROJECTOR and of XTuner.
#
# Both hosts see the repository, the parts and the data under the same paths, and $RUN on a shared file system. MASTER
# is the first host's address in the network that they share; only with it do the ranks meet beyond loopback.
#
# DeepSpeed's launcher, started once, reaches the other host by ssh (and pdsh). HOSTFILE has a line per host,
# "node-a slots=4" and "node-b slots=4":
#   HOSTFILE=hosts MASTER=10.0.0.1 bash scripts/llama3_8b_moslora_two_hosts.sh
# The same without ssh, started on each host with its own RANK_OF_HOST:
#   HOSTFILE=hosts MASTER=10.0.0.1 RANK_OF_HOST=0 bash scripts/llama3_8b_moslora_two_hosts.sh      # and 1 on node-b
# torchrun, started on each host:
#   LAUNCHER=torchrun MASTER=10.0.0.1 RANK_OF_HOST=0 bash scripts/llama3_8b_moslora_two_hosts.sh   # and 1 on node-b
# SLURM, one task per host, which starts torchrun there; a requeued job is resumed:
#   LAUNCHER=slurm sbatch --nodes 2 --ntasks-per-node 1 --gpus-per-node 4 --requeue \
#       scripts/llama3_8b_moslora_two_hosts.sh
#
# gloo and NCCL choose their network card themselves; where they choose wrong, name it:
# GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0.
# Planned, python scripts/plan.py --config scripts/llama3_8b_moslora_two_hosts.sh --gpu a100-80 --records 665298:
#   fits on 8 × A100 with 79.1 GiB: 67.9 to 76.5 GiB a GPU, 3.0 to 6.8 h for 10,396 steps; --recompute auto: selective
set -euo pipefail
FOLDER=$(dirname "$0")
[ -f "$FOLDER/recipe_defaults.sh" ] || FOLDER=${SLURM_SUBMIT_DIR:?}/scripts  # SLURM runs a copy of this file
source "$FOLDER/recipe_defaults.sh"

LLM=${LLM:-playground/models/Meta-Llama-3-8B-Instruct}
PROJECTOR=${PROJECTOR:-playground/runs/llama3-8b-pretrain/checkpoint-2181/projector}
RUN=${RUN:-playground/runs/llama3-8b-moslora}
GPUS=${GPUS:-4}
LAUNCHER=${LAUNCHER:-deepspeed}
PORT=${PORT:-29500}

case "$LAUNCHER" in
  deepspeed) START=(deepspeed --hostfile "${HOSTFILE:?a file with a line per host}" --master_addr "${MASTER:?}"
                    --master_port "$PORT" ${RANK_OF_HOST:+--no_ssh --node_rank "$RANK_OF_HOST"}) ;;
  torchrun)  START=(torchrun --nnodes 2 --nproc_per_node "$GPUS" --node_rank "${RANK_OF_HOST:?0 on the first host}"
                    --master_addr "${MASTER:?}" --master_port "$PORT") ;;
  slurm)     MASTER=${MASTER:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
             # each host's task finds its own number; the rest of the line is filled in here
             HERE="exec torchrun --nnodes \$SLURM_NNODES --node_rank \$SLURM_NODEID --nproc_per_node $GPUS"
             START=(srun bash -c "$HERE --master_addr $MASTER --master_port $PORT \"\$@\"" torchrun) ;;
  *) echo "error: LAUNCHER=$LAUNCHER; fix: deepspeed, torchrun or slurm" >&2; exit 2 ;;
esac

# 8 GPUs × 8 records. ZeRO-2 shares gradients and optimizer state over both hosts; the frozen 16 GB are on every GPU.
"${START[@]}" "${CODE}scripts/train_vit_llm.py" \
    --deepspeed "${CODE}zero_configs/zero2.json" \
    --model_name_or_path "$LLM" --vision_tower "$TOWER" --pretrain_mm_mlp_adapter "$PROJECTOR" \
    --data_path "$DATA" --image_folder "$IMAGES" \
    --lora_r 64 --lora_alpha 128 --lora_dropout 0.05 \
    --vision_lora_r 64 --vision_lora_alpha 16 --vision_lora_dropout 0.05 \
    --mixer_init kaiming_uniform \
    --learning_rate 2e-5 --per_device_train_batch_size 8 --global_batch_size 64 \
    "${STAGE_2[@]}" --output_dir "$RUN" "$@"
