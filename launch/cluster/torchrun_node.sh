#!/usr/bin/env bash
# torchrun with a c10d rendezvous: started on every host, in any order. With --deepspeed CONFIG it is DeepSpeed, else DDP.
#   NODES=2 RANKS_PER_NODE=8 RENDEZVOUS=node1:29400 JOB=sst2-1 bash launch/cluster/torchrun_node.sh \
#       --task sst2 --model roberta-large --output_dir /shared/runs/sst2
# All is the same on every host. RENDEZVOUS is one of the hosts, JOB a name that no other job has there.
# RESTARTS (default 0) starts the ranks anew after a failure; give --resume auto with it, and NODES=1:2 to go on with
# fewer hosts. COMMAND=doctor checks the hosts in place of training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
read -r -a program <<<"${PROGRAM:--m rose_ds}"
exec torchrun --nnodes "${NODES:?number of hosts, or MIN:MAX}" --nproc_per_node "${RANKS_PER_NODE:?GPUs of a host}" \
    --rdzv_backend c10d --rdzv_endpoint "${RENDEZVOUS:?HOST:PORT of one of the hosts}" --rdzv_id "${JOB:-rose_ds}" \
    --max_restarts "${RESTARTS:-0}" "${program[@]}" "${COMMAND:-train}" "$@"
