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

# SIGUSR1 is left to the ranks: a scheduler sends it to every process of a step; launchers would die of it, and so would a process that
# has not started to train. Ignored signals are inherited, training installs its handler.
without_usr1() { ( trap '' USR1; exec "$@" ); }

# What can be refused is refused here, once, before a launcher starts processes and starts them again.
check() {  # check WORLD_SIZE
    without_usr1 "$PYTHON" -m nha_megatron check --inputs --world-size "$1" "$config" "${overrides[@]}" >/dev/null || exit $?
}

# A name that does not resolve keeps all nodes waiting for each other; tested before they start to.
resolve_names() {  # resolve_names ADDRESS... (cluster/host_names.py)
    without_usr1 "$PYTHON" -m nha_megatron.cluster.host_names "$@" || exit $?
}

# ---- Stopping ----
#
# The launchers end their ranks before these have saved, and return 1. So they do not hear of SIGTERM, SIGINT and SIGHUP: they run in a
# process group of their own, and this shell asks the ranks to save and stop. What it knows of them: nha_megatron/exit_status.py.
count() {  # count STATE
    local place found=0
    for place in "$notes"/rank_*.$1; do [ ! -e "$place" ] || found=$((found + 1)); done
    echo "$found"
}

signal_ranks() {  # signal_ranks SIGNAL
    local place pid
    for place in "$notes"/rank_*ing; do
        if read -r pid 2>/dev/null < "$place"; then kill -s "$1" "$pid" 2>/dev/null || :; fi
    done
}

# A dead process may wait for ever to be collected, where a container's first process does not do it.
alive() { kill -0 "$1" 2>/dev/null && ! grep -qs '^State:[[:space:]]*Z' "/proc/$1/status"; }

anyone_alive() {
    local place pid
    alive "$launcher" && return 0
    for place in "$notes"/rank_*ing; do
        if read -r pid 2>/dev/null < "$place" && alive "$pid"; then return 0; fi
    done
    return 1
}

end_at_once() {
    local turn
    for turn in 1 2 3; do  # ranks that the launcher had just started introduce themselves late
        kill -s KILL -- "-$launcher" 2>/dev/null || :
        signal_ranks KILL
        [ "$turn" = 3 ] || sleep 0.3 || :
    done
}

# On one node nothing is lost before all ranks train, and starting may take minutes. Of several nodes one cannot know how far the others are.
nothing_trained() { [ "$nodes" = 1 ] && [ $(($(count training) + $(count 'ended-*'))) -lt "$local_ranks" ]; }

stop() {  # stop SIGNAL: the handler of signals, so that none is lost between a test and a wait
    [ -z "$asked" ] || return 0
    asked=$1
    [ -n "$launcher" ] || return 0
    if [ "$command" != pretrain ]; then
        [ "$1" = USR1 ] || end_at_once
        return 0
    fi
    local deadline=$((SECONDS + STOP_TIMEOUT))
    say "SIG$1: asking the processes to save and stop; SIGQUIT (Ctrl-\\) ends them unsaved"
    while anyone_alive; do
        if nothing_trained; then
            say "stopped before training began: the newest checkpoint is the newest state"
            before_training=yes
            end_at_once
        elif [ "$SECONDS" -ge "$deadline" ]; then
            say "not saved within STOP_TIMEOUT, $STOP_TIMEOUT s: ending the processes"
            end_at_once
        else
            signal_ranks USR1  # again and again: a rank may be between two stages, or have been started again
        fi
        sleep 0.5 || :  # a signal to the group ends it
    done
}

quit() {
    asked=${asked:-QUIT}
    [ -z "$launcher" ] || end_at_once
}

say() { echo "${0##*/}: $*" >&3; }

# Runs the launcher and leaves with the status that the training processes noted (nha_megatron/exit_status.py).
run_and_exit() {
    local status=0 noted stopped
    notes=$(mktemp -d)
    NHA_EXIT_NOTE=$notes/status
    export NHA_EXIT_NOTE
    : > "$NHA_EXIT_NOTE"
    if [ -n "$asked" ]; then rm -r "$notes"; exit 75; fi  # warned while the configuration was checked
    trap 'stop INT' INT
    trap 'stop TERM' TERM
    trap 'stop HUP' HUP
    trap quit QUIT
    set -m  # a process group of its own, for what is started
    ( set +m; trap '' USR1; exec "$@" ) </dev/null 3>&- &
    launcher=$!
    set +m
    [ -z "$asked" ] || { stopped=$asked; asked=; stop "$stopped"; }  # asked in between
    {
        wait "$launcher" || status=$?  # ends early when a signal comes; its handler then waits for the end
        [ -z "$asked" ] || { status=0; wait "$launcher" || status=$?; }
        # The launcher was killed, its ranks were not.
        [ "$status" -le 128 ] || [ -n "$asked" ] || ! anyone_alive || stop TERM
    } 2>/dev/null  # bash reports jobs that a signal ended
    noted=$(cat "$NHA_EXIT_NOTE")
    stopped=$(count ended-75)
    rm -r "$notes"
    # All ranks agreed and saved, whatever became of the launcher.
    [ "$stopped" -lt "$local_ranks" ] && [ -z "$before_training" ] || exit 75
    # A launcher that returns 0 although no process noted its end has lost them.
    [ "$status" != 0 ] || exit "${noted:-1}"
    [ "$status" -le 128 ] || status=1
    exit "$status"
}

# This code and no other: python -m would take packages from the working directory first. A checkout, or its frozen copy, has the kernels
# in a folder of their own; of an installed package Python knows the way, and its neighbours must not come before the standard library.
[ ! -d "$code/kernels/nha_kernels" ] || export PYTHONPATH=$code:$code/kernels${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
NPROC_PER_NODE=${NPROC_PER_NODE:-$(processes_of_this_node)}
STOP_TIMEOUT=${STOP_TIMEOUT:-600}

exec 3>&2
nodes=1 local_ranks=$NPROC_PER_NODE asked='' launcher='' notes='' before_training=''
trap 'stop USR1' USR1
