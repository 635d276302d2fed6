#!/usr/bin/env bash
# The one task of a node: torchrun with the ranks of this node. Started by srun.
set -euo pipefail
source launch/program.sh
exec torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$RANKS_PER_NODE" --node_rank "$SLURM_NODEID" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "${program[@]}" "$@"
