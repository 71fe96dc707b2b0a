# shellcheck shell=bash
# What every job of this folder does: set up the node, start the ranks, save and requeue before the time limit.
#
# A job script sources this, then calls `ranks PYTHON_ARGUMENTS` (a process per task, by srun) and `alone
# PYTHON_ARGUMENTS` (one process, on the first node). slurm/submit.py sets, from the site file:
#   DIGIT_HOME          the folder that contains slurm/ and tools/: the checkout (default: the folder that sbatch was called in), or
#                       the installed package
#   DIGIT_ROOT          the folder that relative paths start from; default: DIGIT_HOME
#   DIGIT_PYTHON        words of the command that runs Python, one a line (container, then interpreter)
#   DIGIT_MODULES       environment modules to load, one a line
#   DIGIT_INTERFACE     network interface of NCCL and gloo
#   DIGIT_STATE         file that records how the step ended
#   DIGIT_MAX_RESTARTS  how often a job requeues itself before it is considered stuck

set -euo pipefail

readonly SAVED=75 # exit status of ranks that were told to stop, saved and want to continue (EX_TEMPFAIL)

# A full disk must not stop the ranks or prevent a requeue: failures to print are ignored.
say() { echo "== $(date '+%F %T') $SLURM_JOB_NAME $SLURM_JOB_ID: $*" || true; }

# Record the state of the step atomically: `submit.py --status` reads it.
record() { # record STATUS EXIT
    [ -n "${DIGIT_STATE:-}" ] || return 0
    printf '{"status": "%s", "job": %d, "exit": %d, "restarts": %d}\n' \
        "$1" "$SLURM_JOB_ID" "$2" "${SLURM_RESTART_COUNT:-0}" >"$DIGIT_STATE.part" &&
        mv "$DIGIT_STATE.part" "$DIGIT_STATE" && return 0
    say "error: $DIGIT_STATE cannot be written"
    return 1
}

child=0         # process id of the running command: srun, or Python alone
interrupted=0   # a signal was received since the last wait
time_is_up=0    # USR1: the time limit is near, or preemption: save, requeue, continue
told_to_stop=0  # TERM: scancel, or scontrol requeue, where Slurm itself requeues

on_usr1() {
    interrupted=1 time_is_up=1
    say "the time limit is near: the ranks save and leave"
    [ "$child" -eq 0 ] || kill -USR1 "$child" 2>/dev/null || true # srun passes it on to all ranks
}
on_term() {
    interrupted=1 told_to_stop=1
    say "told to stop: the ranks save and leave"
    [ "$child" -eq 0 ] || kill -TERM "$child" 2>/dev/null || true
}
trap on_usr1 USR1
trap on_term TERM

# Run a command so that signals reach this shell at once; exit the job when the command fails.
attend() {
    local status
    [ "$told_to_stop" -eq 0 ] || stopped 143
    [ "$time_is_up" -eq 0 ] || requeue
    "$@" &
    child=$!
    while true; do
        interrupted=0
        status=0
        wait "$child" || status=$?
        [ "$interrupted" -eq 1 ] || break
    done
    child=0
    [ "$status" -ne 0 ] || return 0
    [ "$told_to_stop" -eq 0 ] || stopped "$status"
    if [ "$time_is_up" -eq 1 ] || [ "$status" -eq "$SAVED" ]; then
        requeue
    fi
    if ! nodes_answer; then
        say "a node of this job does not answer"
        requeue
    fi
    record failed "$status" || true
    say "failed: the steps that need this one will not start"
    exit "$status"
}

# The ranks on other nodes fail minutes before Slurm notices a lost node: this is not a failure of the step.
nodes_answer() {
    [ "$SLURM_NNODES" -eq 1 ] ||
        timeout 60 srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task=1 true 2>/dev/null
}

stopped() { # stopped STATUS
    record stopped "$1" || true
    exit "$1"
}

requeue() {
    # The ranks of a cancelled job can end before this shell gets its signal, and Slurm restarts every job that asks for
    # it: a job that Slurm is ending (no longer RUNNING) must not ask.
    local state
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p') || true
    [ "${state:-RUNNING}" = RUNNING ] || stopped "$SAVED"
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${DIGIT_MAX_RESTARTS:-100}" ]; then
        record failed "$SAVED" || true
        say "error: requeued $SLURM_RESTART_COUNT times, expected to be done: is the time limit too short for progress?"
        exit "$SAVED"
    fi
    record requeued "$SAVED" || true
    say "requeued, to continue where the ranks saved"
    if ! scontrol requeue "$SLURM_JOB_ID"; then # a job with --no-requeue
        record failed "$SAVED" || true
        exit "$SAVED"
    fi
    exit 0
}

mapfile -t python <<<"${DIGIT_PYTHON:-python}"

# Python on every task of the job. The process itself reads its rank from srun's variables.
ranks() {
    local first address
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # If node names are not host names, Slurm provides the address.
    getent hosts "$first" >/dev/null && address=$first ||
        address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export MASTER_ADDR=$address
    export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # differs between jobs that share a node
    attend srun --kill-on-bad-exit=1 "${python[@]}" "$@"
    unset MASTER_ADDR MASTER_PORT
}

# One Python process on the first node, for work that is too short for several ranks.
alone() { attend "${python[@]}" "$@"; }

# A step is complete only when its script calls this; any other end is a failure.
complete() {
    record complete 0 || exit 1
    say "complete"
}

cd "${DIGIT_ROOT:-${DIGIT_HOME:-$SLURM_SUBMIT_DIR}}"
tools=tools
# shellcheck disable=SC2034 # read by the job scripts
[ "${DIGIT_ROOT:-}" = "${DIGIT_HOME:-}" ] || tools=$DIGIT_HOME/tools
mapfile -t modules <<<"${DIGIT_MODULES:-}"
for name in "${modules[@]}"; do
    [ -z "$name" ] || module load "$name"
done

export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take it from sbatch by itself
if [ -n "${DIGIT_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$DIGIT_INTERFACE GLOO_SOCKET_IFNAME=$DIGIT_INTERFACE
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 # a lost rank stops the others instead of leaving them waiting
# Compilers' caches on the node's own disk (a shared one is slow and races between nodes), new for each attempt:
# a killed build leaves a lock that the next build would wait for.
cache=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/digit-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
trap 'rm -rf "$cache"' EXIT
export TRITON_CACHE_DIR=$cache/triton TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/extensions

record running 0 || true
say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks"
