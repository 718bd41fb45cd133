#!/usr/bin/env bash
# Trains with torchrun: all processes of one node, or this node's processes of a run on several.
#
#   torchrun.sh CONFIG.yaml [section.key=value ...]
#   torchrun.sh health CONFIG.yaml [...]      test devices, network, disk and clocks instead of training
#
# On several nodes run the same command on each, with
#   NNODES=4                     nodes of the run (MIN:MAX: torchrun goes on with fewer when one is lost)
#   RDZV_ENDPOINT=host:port      where they meet: one of the nodes, a free port, the same everywhere
#   RDZV_ID=name                 of this run, the same everywhere                  [nha]
# and for one or several
#   NPROC_PER_NODE=8             processes of this node           [one per visible GPU, 1 without]
#   MAX_RESTARTS=3               times that all processes are started again, from the newest checkpoint, after one failed [3]
#   LOCAL_ADDR=address           of this node, as the others reach it              [its name; on one node 127.0.0.1]
#   RDZV_TIMEOUT=300             seconds to wait for all nodes                     [300]
#   STOP_TIMEOUT=600             seconds to save after a request to stop, before SIGKILL [600]
#   PYTHON=python3               interpreter
#
# SIGTERM, SIGINT (Ctrl-C), SIGUSR1 or SIGHUP to this script ask the processes to save after their step and stop; SIGQUIT ends them unsaved.
# Exit status: 0 complete, 1 failed, 2 a mistake in the configuration (nothing was started), 3 given up by its
# guards (not started again), 75 stopped on request and saved.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

NNODES=${NNODES:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$STOP_TIMEOUT
# torch 2.13 keeps one store for all starts of the ranks: started again, they read the addresses of the dead ones and wait for ever.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# One node needs no name: that of a laptop or a container may not resolve, and the ranks would look for it for ever.
meeting=(--standalone "--local-addr=${LOCAL_ADDR:-127.0.0.1}")
if [ "$NNODES" != 1 ]; then
    nodes=several
    [ -n "${RDZV_ENDPOINT:-}" ] || fail "NNODES is $NNODES: set RDZV_ENDPOINT=host:port, one of the nodes and a free port, the same on all"
    meeting=(--rdzv-backend=c10d "--rdzv-endpoint=$RDZV_ENDPOINT" "--rdzv-id=${RDZV_ID:-nha}"
        "--rdzv-conf=join_timeout=${RDZV_TIMEOUT:-300}")
    names=("RDZV_ENDPOINT=$RDZV_ENDPOINT")
    if [ -n "${LOCAL_ADDR:-}" ]; then
        meeting+=("--local-addr=$LOCAL_ADDR")
        names+=("LOCAL_ADDR=$LOCAL_ADDR")
    else
        names+=(--own-name)
    fi
    resolve_names "${names[@]}"
fi
case $NNODES in
    *:*) ;;  # the world follows from who comes; each process checks it
    *) check $((NNODES * NPROC_PER_NODE)) ;;
esac

# A health check tells once what is wrong; starting it again would only hide a device that fails now and then.
[ "$command" = pretrain ] || MAX_RESTARTS=0

# Of the signals torchrun hears SIGQUIT alone: of the others it would end the ranks, and say so with a traceback. When SIGTERM ends it,
# common.sh looks after the ranks.
run_and_exit "$PYTHON" -m torch.distributed.run "--nnodes=$NNODES" "--nproc-per-node=$NPROC_PER_NODE" \
    "--max-restarts=${MAX_RESTARTS:-3}" "${meeting[@]}" --signals-to-handle=SIGQUIT \
    -m nha_megatron "$command" "$config" "${overrides[@]}"
