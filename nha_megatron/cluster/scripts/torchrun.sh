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
#   RDZV_TIMEOUT=300             seconds to wait for all nodes                     [300]
#   STOP_TIMEOUT=600             seconds to save after SIGTERM or SIGINT, before SIGKILL [600; torch 2.11 always waits 30]
#   PYTHON=python3               interpreter
#
# Exit status: 0 complete, 1 failed, 2 a mistake in the configuration (nothing was started), 3 given up by its
# guards (not started again), 75 stopped on request and saved.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

NNODES=${NNODES:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_TIMEOUT:-600}
# torch 2.13 keeps one store for all starts of the ranks: started again, they read the addresses of the dead ones and wait for ever.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
meeting=(--standalone)
if [ "$NNODES" != 1 ]; then
    [ -n "${RDZV_ENDPOINT:-}" ] || fail "NNODES is $NNODES: set RDZV_ENDPOINT=host:port, one of the nodes and a free port, the same on all"
    meeting=(--rdzv-backend=c10d "--rdzv-endpoint=$RDZV_ENDPOINT" "--rdzv-id=${RDZV_ID:-nha}"
        "--rdzv-conf=join_timeout=${RDZV_TIMEOUT:-300}")
fi
case $NNODES in
    *:*) ;;  # the world follows from who comes; each process checks it
    *) check $((NNODES * NPROC_PER_NODE)) ;;
esac

# A health check tells once what is wrong; starting it again would only hide a device that fails now and then.
[ "$command" = pretrain ] || MAX_RESTARTS=0

run_and_exit "$PYTHON" -m torch.distributed.run "--nnodes=$NNODES" "--nproc-per-node=$NPROC_PER_NODE" \
    "--max-restarts=${MAX_RESTARTS:-3}" "${meeting[@]}" \
    -m nha_megatron "$command" "$config" "${overrides[@]}"
