#!/usr/bin/env bash
# Makes .venv with the test extras and runs the tests; arguments go to pytest:
#   bash launch/test.sh              everything, two files at a time (ROSE_DS_TEST_WORKERS=N for another number)
#   bash launch/test.sh -m fast      the quick ones
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/venv.sh" test
cd "$root"
# files side by side, as half of a launch is the imports of one process; in their order, the longest (e2e) first
exec python -m pytest -n "${ROSE_DS_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
