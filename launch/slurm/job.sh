# shellcheck shell=bash
# What the sbatch scripts share; sourced by them, on the job's first node.

# Where rank 0 listens: the first node, and a port that follows from the job's number, so that jobs on one node differ.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not into head: pipefail would take its closed pipe for an error
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# GPUs of a node (--gpus-per-node=8, or a100:8); ranks of a node where there are none
ranks=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
RANKS_PER_NODE=${RANKS_PER_NODE:-${ranks##*:}}
: "${RANKS_PER_NODE:?ask for --gpus-per-node, or set RANKS_PER_NODE}"
# Both launchers wait so long for their ranks to save a checkpoint on SIGTERM, less than the 300 s that --signal leaves
# (torch 2.13 and later; before, 30 s).
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
export MASTER_ADDR MASTER_PORT RANKS_PER_NODE TORCH_ELASTIC_SHUTDOWN_TIMEOUT

# Runs a command with the arguments given here and --resume auto as one task on each node. On SIGTERM (preemption, or 300 s
# before the time limit) the ranks save a checkpoint together; then the job goes back into the queue.
run_on_all_nodes() {
    local step code stopped=
    # a lost node must end the others' task too: they would wait for it
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 --export=ALL "$@" --resume auto &
    step=$!
    # --signal=B: sends it to this shell alone; scancel without --batch signals the tasks, and not this shell
    trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
    code=0
    wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do # the signal interrupts wait
        code=0
        wait "$step" || code=$?
    done
    if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
        echo "stopped by SIGTERM; back into the queue, to go on from the newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
