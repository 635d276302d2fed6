#!/usr/bin/env bash
# DeepSpeed without ssh: started by hand on every host of a hostfile. (A scheduler that stops jobs by SIGTERM should start
# torchrun_node.sh --deepspeed CONFIG: the deepspeed command passes none on, and the ranks would train on without it. By
# hand: kill deepspeed.launcher.launch, which it starts.)
#   NODE_RANK=0 HOSTFILE=launch/cluster/hostfile bash launch/cluster/deepspeed_node.sh --deepspeed ds_configs/zero2_bf16.json \
#       --task sst2 --model roberta-large --output_dir /shared/runs/sst2
# NODE_RANK is the host's line in the hostfile, counted from 0; all else is the same on every host.
# MASTER_ADDR (default: the hostfile's first host) and MASTER_PORT are where rank 0 listens.
# COMMAND=doctor checks the hosts in place of training. PROGRAM and COMMAND: a script of your own (docs/cluster.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
hostfile=${HOSTFILE:-launch/cluster/hostfile}
first=$(awk '!/^#/ && NF { print $1; exit }' "$hostfile")
source launch/program.sh
slots=$(awk -v line="${NODE_RANK:?the line of this host in the hostfile, from 0}" \
    '!/^#/ && NF && n++ == line { sub(/.*slots=/, ""); print $1 + 0 }' "$hostfile")
share_cores "${slots:-0}"
[[ ${program[0]} != -m ]] || program[0]=--module # as the deepspeed command calls it
exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" \
    --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}" \
    --no_local_rank "${program[@]}" "$@"
