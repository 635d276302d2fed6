#!/usr/bin/env bash
# Makes .venv with the test extras and runs the tests; arguments go to pytest:
#   bash launch/test.sh              everything, 20 to 30 minutes on 2 cores
#   bash launch/test.sh -m fast      the quick ones
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/venv.sh" test
cd "$root"
exec python -m pytest "$@"
