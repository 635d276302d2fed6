# shellcheck shell=bash
# What the ranks run, as the array program, for the scripts that start them; sourced by them, in this folder's parent.
# PROGRAM and COMMAND: docs/cluster.md.
PROGRAM=${PROGRAM:--m rose_ds}
[ "$PROGRAM" != "-m rose_ds" ] || COMMAND=${COMMAND:-train}
# shellcheck disable=SC2034  # it is theirs
read -r -a program <<<"$PROGRAM ${COMMAND:-}"
