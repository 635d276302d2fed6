#!/usr/bin/env bash
# accelerate launch (FSDP) on every host.
#   NODES=2 RANKS=16 NODE_RANK=0 MASTER_ADDR=node1 bash launch/cluster/accelerate_node.sh \
#       --task sst2 --model bert-large-uncased --output_dir /shared/runs/sst2
# NODES hosts with RANKS processes in all; NODE_RANK is 0 on the host MASTER_ADDR, then 1, 2, ...; the rest is the same.
# CONFIG is an accelerate config; whatever it says of machines and processes, the variables decide. The one that is taken
# without it, ds_configs/fsdp2_nodes.yaml, names BERT's blocks: for another model give a copy with that model's.
# COMMAND=doctor checks the hosts in place of training. PROGRAM and COMMAND: a script of your own (docs/cluster.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source launch/program.sh
share_cores $((${RANKS:?ranks of all hosts together} / ${NODES:?number of hosts}))
exec accelerate launch --config_file "${CONFIG:-ds_configs/fsdp2_nodes.yaml}" \
    --num_machines "$NODES" --num_processes "$RANKS" \
    --machine_rank "${NODE_RANK:?0 on MASTER_ADDR, then 1, 2, ...}" \
    --main_process_ip "${MASTER_ADDR:?the host of machine rank 0}" --main_process_port "${MASTER_PORT:-29500}" \
    "${program[@]}" "$@"
