#!/usr/bin/env bash
# Trains a small BERT on movie-review sentences three times, with plain AdamW, with ROSE-Ensemble, and with the same whose
# first-order risk is found fast, all through the deepspeed launcher at ZeRO-2, and compares them on clean and perturbed
# text. Asks nothing; the results are in runs/quickstart. STEPS (default 80) sets the budget of each run, SEED the seed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/venv.sh" demo
cd "$root"

out=runs/quickstart
# CUDA devices, and a config with bf16 where the hardware has it
hardware=$(python - <<'EOF'
import torch
from rose_ds.hardware import has_bf16

gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(gpus, "zero2_bf16.json" if has_bf16() else "zero2.json")
EOF
)
read -r gpus config <<<"$hardware"
ranks=2 where=(--num_gpus 2)
if [ "$gpus" -gt 0 ]; then
    ranks=$((gpus < 2 ? gpus : 2))
    where=(--num_gpus "$ranks")
    # deepspeed drops the variable where it is told a number of GPUs (and knows no ids but numbers)
    if [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9]+(,[0-9]+)*$ ]]; then
        where=(--include "localhost:$(cut -d, -f "1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
    fi
else
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # tensors in huge pages
fi
# DeepSpeed compiles a small extension on first use; a folder of our own is not blocked by a lock that a killed job left.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$root/.venv/torch_extensions}
export TOKENIZERS_PARALLELISM=false

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

train() { # NAME [flags of the method]
    local run="$out/$1"
    shift
    rm -rf "${run:?}"
    mkdir -p "$run"
    echo "training $(basename "$run") (log: $run/train.log)"
    deepspeed "${where[@]}" --master_port "$(free_port)" launch/train.py --deepspeed "ds_configs/$config" \
        --task snippets --model minilm "$@" --output_dir "$run" --seed "${SEED:-0}" --max_steps "${STEPS:-80}" \
        --per_device_train_batch_size 8 --learning_rate 2e-4 --train_sampling_strategy group_by_length \
        --save_strategy no --max_eval_samples 500 \
        2>&1 | tee "$run/train.log" | tr '\r' '\n' | grep --line-buffered -E "[0-9]+0/[0-9]+ |error|Error|clean" || {
        status=${PIPESTATUS[0]}
        [ "$status" -eq 0 ] || { tail -n 40 "$run/train.log" >&2; exit "$status"; }
    }
    [ -f "$run/metrics.json" ] || { tail -n 40 "$run/train.log" >&2; exit 1; }
}

train vanilla --method vanilla
train rose-ensemble --method rose-ensemble
train rose-ensemble-fast --method rose-ensemble --first_order fast
rose-ds report "$out"/{vanilla,rose-ensemble,rose-ensemble-fast} --output_dir "$out"
