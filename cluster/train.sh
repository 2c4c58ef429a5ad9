#!/usr/bin/env bash
# One machine's part of a training, on any cluster: joins the other machines and starts this one's processes.
#
#   NODES=2 RANK=0 HEAD=first-machine PROCESSES=8 cluster/train.sh jobs/train_rae.py config=... output=...
#
# NODES machines with PROCESSES processes each (one per GPU); this is number RANK; machine 0 is HEAD, at PORT. It exits
# with 0 when the training is finished and with 2 when its keys are bad; after anything else the same command goes on.
set -euo pipefail
: "${NODES:?how many machines}" "${RANK:?number of this machine, from 0}" "${HEAD:?name or address of machine 0}"
processes=$((NODES * ${PROCESSES:=1}))
words=(--num_machines "$NODES" --machine_rank "$RANK" --num_processes "$processes" --rdzv_backend c10d
    --main_process_ip "$HEAD" --main_process_port "${PORT:-29500}" --mixed_precision no --dynamo_backend no
    --num_cpu_threads_per_process "${THREADS:-1}")
if ((processes == 1)); then # the launcher of a single process passes no signal on
    export OMP_NUM_THREADS="${THREADS:-1}"
    exec python "$@"
fi
# Leaves with 2 where the keys are bad, which the launcher would turn into 1. CHECKED=true: train.sbatch has seen to it.
${CHECKED:-false} || python "$@" --check
words+=(--multi_gpu)
# Slurm warns every process by USR1. The training saves and ends; its launcher would be killed, and end it unsaved.
trap '' USR1
exec accelerate launch "${words[@]}" "$@"
