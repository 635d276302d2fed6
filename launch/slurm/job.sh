# shellcheck shell=bash
# What the sbatch scripts share; sourced by them, on the job's first node.

# Where rank 0 listens: the first node, and a port that follows from the job's number, so that jobs on one node differ.
# ROSE_MASTER_ADDR where the fast network has names of its own; a MASTER_PORT in the shell of sbatch is not this job's.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not into head: pipefail would take its closed pipe for an error
MASTER_ADDR=${ROSE_MASTER_ADDR:-${hosts%%$'\n'*}}
MASTER_PORT=${ROSE_MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# Ranks of a node: its GPUs (--gpus-per-node=8, or a100:8), whatever RANKS_PER_NODE another script has left in the shell.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
RANKS_PER_NODE=${ROSE_RANKS_PER_NODE:-${gpus##*:}}
[ "$RANKS_PER_NODE" != 0 ] || RANKS_PER_NODE=
: "${RANKS_PER_NODE:?ask for --gpus-per-node, or set ROSE_RANKS_PER_NODE}"
# Both launchers wait so long for their ranks to save a checkpoint on SIGTERM, less than the 300 s that --signal leaves
# (torch 2.13 and later; before, 30 s).
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
# srun does not take sbatch's --cpus-per-task over (Slurm 22.05 and later): all ranks would share one core
SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}
export MASTER_ADDR MASTER_PORT RANKS_PER_NODE TORCH_ELASTIC_SHUTDOWN_TIMEOUT SRUN_CPUS_PER_TASK
source launch/program.sh
share_cores "$RANKS_PER_NODE" "$SRUN_CPUS_PER_TASK"

# Whether flags of training, in any of their spellings, leave no checkpoint.
saves_nothing() {
    local words=" ${*,,} "
    words=${words//_/-}
    [[ $words =~ \ --save-strategy[=\ ]no\  || $words =~ \ --save-only-model([=\ ](true|t|yes|y|1))?\ (--|$) ]]
}

# Runs a command with the arguments given here as one task on each node, in CONTAINER if that is set
# (CONTAINER="apptainer exec --nv --bind /shared rose.sif"); training with --resume auto. Before the time limit, and when
# the job is preempted, the ranks save a checkpoint together; then the job goes back into the queue. A cancelled job does
# not, nor at its time limit one whose flags leave it nothing to go on from: it would begin anew each time.
run_on_all_nodes() {
    local step code container resume=() stopped=
    read -r -a container <<<"${CONTAINER:-}"
    [ "${program[*]}" != "-m rose_ds train" ] || resume=(--resume auto)
    # what --signal=B: sends to this shell, and to it alone; scancel without --batch signals the tasks, and not this shell
    trap 'stopped="the time limit is near"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
    trap : TERM # of a cancelled job, whose tasks get it too: this shell stays until they have ended
    # a lost node must end the others' task too: they would wait for it
    srun --kill-on-bad-exit=1 --ntasks-per-node=1 --export=ALL "${container[@]}" "$@" "${resume[@]}" &
    step=$!
    code=0
    wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do # a signal interrupts wait
        code=0
        wait "$step" || code=$?
    done
    # a preemption with GraceTime signals the tasks alone, and this shell when the time is over
    if [ "$code" -ne 0 ] && [ -z "$stopped" ] && [[ $(scontrol show job "$SLURM_JOB_ID") == *' PreemptTime='[0-9]* ]]; then
        stopped=preempted
    fi
    if [ "$code" -ne 0 ] && [ -n "$stopped" ]; then
        if [ "$stopped" != preempted ] && saves_nothing "$@"; then
            echo "stopped ($stopped); not put back into the queue: --save_strategy no or --save_only_model leaves nothing to go on from"
            return "$code"
        fi
        echo "stopped ($stopped); back into the queue, to go on from the newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
