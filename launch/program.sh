# shellcheck shell=bash
# What the ranks run, as the array program, and with how many threads, for the scripts that start them; sourced by them,
# in this folder's parent.
# PROGRAM and COMMAND: docs/cluster.md.
PROGRAM=${PROGRAM:--m rose_ds}
[ "$PROGRAM" != "-m rose_ds" ] || COMMAND=${COMMAND:-train}
# shellcheck disable=SC2034  # it is theirs
read -r -a program <<<"$PROGRAM ${COMMAND:-}"

# share_cores RANKS [CORES]: so many cores, by default all of this host, among so many ranks, where nobody has said
# otherwise. Left alone torchrun and accelerate give a rank one thread, for offloaded steps too, and deepspeed gives each
# all cores.
share_cores() {
    local cores=${2:-$(nproc)}
    [[ $1 != *[!0-9]* && $1 -gt 0 ]] || return 0 # torchrun takes words for a number: gpu
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}
