#!/usr/bin/env bash
# DeepSpeed on all hosts of a hostfile, started on one of them; pdsh reaches the others through ssh.
#   HOSTFILE=launch/cluster/hostfile bash launch/cluster/deepspeed_pdsh.sh --deepspeed ds_configs/zero2_bf16.json \
#       --task sst2 --model roberta-large --output_dir /shared/runs/sst2
# Needs on every host: this folder and the Python environment at the same path, sshd, and a key without a password.
# MASTER_ADDR (default: the hostfile's first host) and MASTER_PORT are where rank 0 listens.
# COMMAND=doctor checks the hosts in place of training. PROGRAM and COMMAND: a script of your own (docs/cluster.md).
# Variables that every rank needs go into ~/.deepspeed_env or .deepspeed_env here, NAME=value on each line, since ssh
# carries no environment over (DeepSpeed passes on PYTHON* and NCCL* by itself): for steps on CPUs OMP_NUM_THREADS, a
# rank's share of a host's cores, as each would take them all; where DeepSpeed builds extensions, PATH with ninja's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
hostfile=${HOSTFILE:-launch/cluster/hostfile}
command -v pdsh >/dev/null || { echo "pdsh is not installed: apt install pdsh, or use launch/cluster/deepspeed_node.sh" >&2; exit 1; }
source launch/program.sh
[[ ${program[0]} != -m ]] || program[0]=--module # as the deepspeed command calls it
# DeepSpeed quotes words with a space for the hosts' shells, and no others ("layer.*weight", JSON)
for i in "${!program[@]}"; do
    program[i]=$(printf %q "${program[i]}")
done
for word; do
    [[ $word == *" "* ]] || word=$(printf %q "$word")
    set -- "$@" "$word"
    shift
done
first=$(awk '!/^#/ && NF { print $1; exit }' "$hostfile")
exec deepspeed --hostfile "$hostfile" --launcher pdsh --force_multi \
    --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}" \
    --no_local_rank "${program[@]}" "$@"
