# Trains on all nodes of a SLURM job, saves and goes on when the job's time ends or it is preempted.
#
# The body of a job script: what `nha-megatron submit` writes sources it with CONFIG.yaml, and so does launch/slurm/train.sbatch of a
# checkout. The options of sbatch stand in those. What they may set, as environment variables:
#   NHA_CODE             folder of the code to run                                       [required]
#   NHA_LAUNCHER         torchrun | deepspeed                                            [torchrun]
#   NPROC_PER_NODE       processes per node                                              [GPUs per node]
#   NHA_REQUEUE          1: requeue the job after a warning; 0: end it with status 75    [1]
#   NHA_HEALTH           1: test devices, network, disk and clocks before training       [1]
#   NHA_OUTCOME          file that receives the outcome; a job that finds the run done or stopped there ends at once
#   NETWORK_INTERFACE    of the fast network, such as ib0                                [chosen by the libraries]
# and the arrays
#   SRUN_OPTIONS         more options of srun, such as (--container-image=... --container-mounts=...)
#   IN_CONTAINER         a command that runs the rest of its line in a container, such as (apptainer exec --nv image.sif)
#
# SIGUSR1 to this shell (--signal=B: of the job, or `scancel --signal=USR1 --batch ID`): the processes save after their current step,
# and the job is requeued. SIGTERM to this shell (`scancel --signal=TERM --batch ID`): they save, and the job ends.
# Exit status: that of torchrun.sh: 0 complete, 1 failed, 2 a mistake in the configuration,
# 3 given up by its guards, 75 stopped on request and saved.
set -uo pipefail

: "${NHA_CODE:?the folder of the code to run: submit with nha-megatron submit, or launch/slurm/train.sbatch}"
NHA_LAUNCHER=${NHA_LAUNCHER:-torchrun}
declare -p SRUN_OPTIONS >/dev/null 2>&1 || SRUN_OPTIONS=()
declare -p IN_CONTAINER >/dev/null 2>&1 || IN_CONTAINER=()
life=${SLURM_RESTART_COUNT:-0}

log() { echo "[job $SLURM_JOB_ID, start $life, $(date +%FT%T)] $*"; }
record() { [ -z "${NHA_OUTCOME:-}" ] || echo "$1 $SLURM_JOB_ID" >> "$NHA_OUTCOME"; }

# A job of a chain whose predecessors have finished the work has nothing to do.
if [ -n "${NHA_OUTCOME:-}" ] && [ -f "$NHA_OUTCOME" ]; then
    read -r outcome by < <(tail -n 1 "$NHA_OUTCOME")
    case $outcome in
        complete|stopped|refused|given-up) log "nothing to do: job $by left the run $outcome"; exit 0 ;;
    esac
fi

# Containers have no scontrol: everything that needs it is found out here.
NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
MASTER_ADDR=${NODE_NAMES%% *}
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export NODE_NAMES MASTER_ADDR MASTER_PORT
export NNODES=$SLURM_NNODES RDZV_ENDPOINT=$MASTER_ADDR:$MASTER_PORT
export NPROC_PER_NODE=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
[ "$NNODES" = 1 ] && [ "$NHA_LAUNCHER" = deepspeed ] && unset NODE_NAMES
[ -z "${NETWORK_INTERFACE:-}" ] || export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE

asked=
trap 'asked=USR1' USR1
trap 'asked=TERM' TERM

# on_all_nodes COMMAND...: one task per node. Sets `status`. Passes a warning on until the step ends.
on_all_nodes() {
    local step next=0
    # --ntasks and --cpus-per-task: srun would take the first from the job's tasks and not the second (SLURM 22.05).
    # --wait: a node that ends first must not take the others with it before they have saved and left.
    RDZV_ID=$SLURM_JOB_ID.$life.${1##*/}.$command srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --kill-on-bad-exit=0 --wait=60 \
        "${SRUN_OPTIONS[@]}" "${IN_CONTAINER[@]}" bash "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        if [ -n "$asked" ] && [ "$SECONDS" -ge "$next" ]; then
            [ "$next" != 0 ] || log "SIG$asked: asking the processes to save and stop"
            # To all processes of the step. Again and again, because a process that is still starting ignores it.
            scancel --signal=USR1 "$SLURM_JOB_ID"
            next=$((SECONDS + 10))
        fi
        sleep 2 &
        wait $!  # a signal to this shell ends it at once
    done
    wait "$step"
    status=$?
}

launch() {  # launch COMMAND CONFIG [section.key=value ...]
    command=$1
    on_all_nodes "$NHA_CODE/nha_megatron/cluster/scripts/$NHA_LAUNCHER.sh" "$@"
}

log "$SLURM_NNODES nodes ($SLURM_JOB_NODELIST), $NPROC_PER_NODE processes each, $NHA_LAUNCHER, code $NHA_CODE"
status=0
if [ "${NHA_HEALTH:-1}" = 1 ]; then
    launch health "$@"
fi
if [ "$status" = 0 ] && [ -z "$asked" ]; then
    launch pretrain "$@"
elif [ "$status" = 0 ]; then
    status=75  # warned before training began: the last checkpoint is the newest state
fi

case $status in
    0) log "complete"; record complete ;;
    2) log "refused: see the message above"; record refused ;;
    3) log "given up by its guards: see the message above"; record given-up ;;
    75)
        if [ "$asked" = TERM ]; then
            log "stopped on request and saved"
            record stopped
        else
            if [ "${NHA_REQUEUE:-1}" = 1 ]; then
                log "saved; asking SLURM to requeue this job"
                scontrol requeue "$SLURM_JOB_ID"
                answer=$?
                # Above 128: the requeue has ended scontrol, as it is about to end this shell.
                if [ "$answer" = 0 ] || [ "$answer" -gt 128 ]; then sleep 60; exit "$status"; fi
            fi
            log "saved and not requeued: a job of the chain, or the same command again, goes on from here"
            record saved
        fi
        ;;
    *) log "failed with status $status"; record failed ;;
esac
exit "$status"
