#!/usr/bin/env bash
# torchrun with a c10d rendezvous: started on every host, in any order. With --deepspeed CONFIG it is DeepSpeed, else DDP.
#   NODES=2 RANKS_PER_NODE=8 RENDEZVOUS=node1:29400 JOB=sst2-1 bash launch/cluster/torchrun_node.sh \
#       --task sst2 --model roberta-large --output_dir /shared/runs/sst2
# All is the same on every host. RENDEZVOUS is one of the hosts, JOB a name that no other job has there.
# RESTARTS (default 0) starts the ranks anew after a failure; give --resume auto with it. NODES=1:2 goes on with fewer
# hosts, as long as that of RENDEZVOUS is there; give --global_batch_size with it.
# RDZV_CONF is torchrun's --rdzv_conf, e.g. read_timeout=600: so many seconds may the link to RENDEZVOUS be cut, in place
# of 60. COMMAND=doctor checks the hosts in place of training. PROGRAM and COMMAND: a script of your own (docs/cluster.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# ranks that start anew would read the addresses of those before them from the launchers' store: rank 0 makes its own
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
source launch/program.sh
share_cores "${RANKS_PER_NODE:?GPUs of a host}"
exec torchrun --nnodes "${NODES:?number of hosts, or MIN:MAX}" --nproc_per_node "$RANKS_PER_NODE" \
    --rdzv_backend c10d --rdzv_endpoint "${RENDEZVOUS:?HOST:PORT of one of the hosts}" --rdzv_id "${JOB:-rose_ds}" \
    --rdzv_conf "${RDZV_CONF:-}" --max_restarts "${RESTARTS:-0}" "${program[@]}" "$@"
