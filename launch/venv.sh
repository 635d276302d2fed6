#!/usr/bin/env bash
# Makes .venv at the repository's root with pinned requirements and rose_ds itself; does nothing where it is up to date.
# Sourced with the extra to install:  source launch/venv.sh demo
# PYTHON chooses the interpreter (3.11 or 3.12, which the pinned packages need), TORCH the torch requirement.
set -euo pipefail
extra=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
        [ -n "$candidate" ] || continue
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.11 or 3.12 found: install one, or set PYTHON=/path/to/python" >&2
    return 1
}

install_torch() {
    local pip=("$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    if [ -n "${TORCH:-}" ]; then
        "${pip[@]}" "$TORCH"
    elif [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
        "${pip[@]}" torch==2.13.0
    else
        # The local version picks a CPU-only build where pip is configured to find one; the default build runs on CPUs too.
        "${pip[@]}" torch==2.13.0+cpu 2>/dev/null || "${pip[@]}" torch==2.13.0
    fi
}

stamp="$root/.venv/.rose_ds-$extra"
wanted=$(cat "$root/pyproject.toml" "$root/launch/requirements.txt" - <<<"${TORCH:-}" | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    python=$(find_python)
    echo "installing rose_ds[$extra] into .venv ($("$python" --version)); the first time takes a few minutes"
    if [ -e "$root/.venv" ] && ! supported "$root/.venv/bin/python"; then
        aside="$root/.venv.old-$(date +%s)"
        echo "$root/.venv has no Python 3.11 or 3.12, or one that does not start here: it goes to $aside" >&2
        mv "$root/.venv" "$aside"
    fi
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
    # TORCH may be another build than the one that is there
    if [ -n "${TORCH:-}" ] || ! "$root/.venv/bin/python" -c 'import torch' 2>/dev/null; then install_torch; fi
    constraints=$root/.venv/constraints.txt
    cp "$root/launch/requirements.txt" "$constraints"
    # a build of torch for GPUs came with its triton; others have none, and the tests interpret it
    "$root/.venv/bin/python" -c 'import triton' 2>/dev/null || echo 'triton==3.9.0' >>"$constraints"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$constraints" --editable "${root}[$extra]"
    echo "$wanted" >"$stamp"
fi
export PATH="$root/.venv/bin:$PATH"
