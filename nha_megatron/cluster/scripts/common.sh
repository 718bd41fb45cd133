# Shared by torchrun.sh and deepspeed.sh, which source it. Sets: code, PYTHON, NPROC_PER_NODE, command, config.
set -euo pipefail

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
PYTHON=${PYTHON:-python3}

fail() { echo "error: $*" >&2; exit 2; }

# parse "$@": an optional command (pretrain, health), then CONFIG and overrides, which stay in the array `overrides`.
parse() {
    command=pretrain
    case ${1:-} in pretrain|health) command=$1; shift ;; esac
    [ $# -ge 1 ] || fail "usage: ${0##*/} [pretrain|health] CONFIG.yaml [section.key=value ...]"
    config=$1; shift
    overrides=("$@")
}

# One process per GPU that this shell may use, or one process without GPUs.
processes_of_this_node() {
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | wc -l
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        nvidia-smi -L | wc -l
    else
        echo 1
    fi
}

# What can be refused is refused here, once, before a launcher starts processes and starts them again.
check() {  # check WORLD_SIZE
    "$PYTHON" -m nha_megatron check --inputs --world-size "$1" "$config" "${overrides[@]}" >/dev/null || exit $?
}

# Runs the launcher and leaves with the status that the training processes noted (nha_megatron/exit_status.py).
run_and_exit() {
    local status=0 noted
    NHA_EXIT_NOTE=$(mktemp)
    export NHA_EXIT_NOTE
    "$@" || status=$?
    noted=$(cat "$NHA_EXIT_NOTE")
    rm -f "$NHA_EXIT_NOTE"
    # A launcher that returns 0 although no process noted its end has lost them.
    [ "$status" != 0 ] || status=${noted:-1}
    exit "$status"
}

# This code and no other: python -m would take packages from the working directory first. A checkout, or its frozen copy, has the kernels
# in a folder of their own; of an installed package Python knows the way, and its neighbours must not come before the standard library.
[ ! -d "$code/kernels/nha_kernels" ] || export PYTHONPATH=$code:$code/kernels${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
NPROC_PER_NODE=${NPROC_PER_NODE:-$(processes_of_this_node)}

# SIGUSR1 asks the training processes to save and stop. A scheduler sends it to every process of a step; the launchers would
# die of it, and so would a process that has not started to train. Ignored signals are inherited, training installs its handler.
trap '' USR1
