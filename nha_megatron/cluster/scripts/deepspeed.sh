#!/usr/bin/env bash
# Trains with DeepSpeed's launcher. Only the launcher: the engine is the one that training.engine names.
#
#   deepspeed.sh CONFIG.yaml [section.key=value ...]
#   deepspeed.sh health CONFIG.yaml [...]
#
# One node:
#   NPROC_PER_NODE=8             processes                        [one per visible GPU, 1 without]
# A hostfile (lines `name slots=8`), from one of its nodes:
#   HOSTFILE=file                DeepSpeed starts the others over ssh when there are several
#   MASTER_ADDR=host             address of the first host; given, no ssh is made to find it out
#   DEEPSPEED_OPTIONS="..."      more options of the launcher, such as --launcher openmpi
#     The default launcher for several hosts, pdsh, ends a run with `pkill -f` on every host: not for shared machines.
# One launcher per node without ssh (under srun; job_body.sh does it):
#   NODE_NAMES="n1 n2"           all nodes, in the order of their ranks
#   NODE_RANK=0                  of this node                     [SLURM_NODEID]
#   MASTER_ADDR, MASTER_PORT     first node and a free port on it
# PYTHON=python3 is the interpreter, STOP_TIMEOUT=600 the seconds to save after a request to stop.
# The launcher does not start failed processes again; torchrun.sh does.
#
# SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGHUP to this script ask the processes to save after their step and stop; SIGQUIT ends them unsaved.
# (Not over ssh: there DeepSpeed's launcher decides, and its status is returned.)
# Exit status: 0 complete, 1 failed, 2 a mistake in the configuration (nothing was started), 3 given up by its
# guards, 75 stopped on request and saved.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
without_usr1 "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' \
    || fail "the package deepspeed is not installed in $("$PYTHON" -c 'import sys; print(sys.prefix)'): pip install 'nha-megatron[deepspeed]', or use torchrun.sh"

# With a hostfile the launcher overwrites CUDA_VISIBLE_DEVICES by 0, 1, ..: on a shared node these may be somebody else's.
whole_node() {
    local all
    all=$(seq -s, 0 $((NPROC_PER_NODE - 1)))
    [ "${CUDA_VISIBLE_DEVICES:-$all}" = "$all" ] \
        || fail "CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher would replace by $all: take whole nodes, or use torchrun.sh"
}

place=("--master_port=${MASTER_PORT:-29500}")
over_ssh=
if [ -n "${NODE_NAMES:-}" ]; then
    whole_node
    rank=${NODE_RANK:-${SLURM_NODEID:?NODE_NAMES is set: set NODE_RANK, the position of this node in it}}
    hosts=$(mktemp)
    trap 'rm -f "$hosts"' EXIT
    [ -z "${MASTER_ADDR:-}" ] || resolve_names "MASTER_ADDR=$MASTER_ADDR"
    count=0
    for name in $NODE_NAMES; do echo "$name slots=$NPROC_PER_NODE" >> "$hosts"; count=$((count + 1)); done
    place+=(--no_ssh "--node_rank=$rank" "--hostfile=$hosts" "--master_addr=${MASTER_ADDR:?NODE_NAMES is set: set MASTER_ADDR too}")
    world=$((count * NPROC_PER_NODE)) nodes=$count
elif [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || fail "HOSTFILE $HOSTFILE: no such file; give lines such as 'node1 slots=8'"
    place+=("--hostfile=$HOSTFILE")
    if [ -n "${MASTER_ADDR:-}" ]; then
        resolve_names "MASTER_ADDR=$MASTER_ADDR"
        place+=(--no_ssh_check "--master_addr=$MASTER_ADDR")
    fi
    world=$(awk '!/^ *(#|$)/ { for (i = 2; i <= NF; i++) if (sub(/^slots=/, "", $i)) n += $i } END { print n + 0 }' "$HOSTFILE")
    [ "$(grep -cvE '^ *(#|$)' "$HOSTFILE")" -le 1 ] || over_ssh=yes
    local_ranks=$world
else
    # An explicit file that does not exist: the default, /job/hostfile, may.
    place+=("--hostfile=/dev/null/none")
    # Given a number, it would ignore CUDA_VISIBLE_DEVICES; without one it starts a process for each entry.
    if [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then
        place+=("--num_gpus=$NPROC_PER_NODE")
    elif [ "$NPROC_PER_NODE" != "$(processes_of_this_node)" ]; then
        fail "NPROC_PER_NODE is $NPROC_PER_NODE and CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES: name as many devices as processes"
    fi
    world=$NPROC_PER_NODE
fi
check "$world"

# shellcheck disable=SC2206  # options are separated by blanks
options=(${DEEPSPEED_OPTIONS:-})
# DeepSpeed writes a line for every process and variable; its errors still come through.
runner=("$PYTHON" -m deepspeed.launcher.runner --log_level=warning "${place[@]}" "${options[@]}"
    --no_local_rank --module nha_megatron "$command" "$config" "${overrides[@]}")
if [ -n "$over_ssh" ]; then
    without_usr1 "${runner[@]}"  # processes on other hosts cannot leave their note here
else
    run_and_exit "${runner[@]}"
fi
