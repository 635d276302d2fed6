#!/usr/bin/env bash
# The one task of a node: accelerate launch with the ranks of this node. Started by srun.
set -euo pipefail
export NODES=$SLURM_NNODES RANKS=$((SLURM_NNODES * RANKS_PER_NODE)) NODE_RANK=$SLURM_NODEID
exec bash launch/cluster/accelerate_node.sh "$@"
