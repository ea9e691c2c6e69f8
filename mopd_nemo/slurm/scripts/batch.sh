#!/usr/bin/env bash
# The batch step of a job: on its first node, outside the container. Starts node.sh on every node, watches them, hands
# the signal before the time limit on, and decides how the job ends: complete, failed, or saved and queued again.
set -uo pipefail
unset SLURM_EXPORT_ENV # what this script exports reaches the tasks
# shellcheck source=lib.sh
source "$MOPD_SCRIPTS/lib.sh"

readonly LOOK_EVERY=2
attempt=${SLURM_RESTART_COUNT:-0}
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
export MOPD_LOGS=$MOPD_DIR/job/logs/$job-attempt-$attempt
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MOPD_HEAD_NODE=${nodes[0]}

main() {
  trap 'note "the time limit is near: asking the run to save and stop"; put "$MOPD_LOGS/stop" walltime' USR1
  trap 'note "Slurm ends this job"' TERM
  mkdir -p "$MOPD_LOGS/beats" || { note "ERROR: cannot write log directory $MOPD_LOGS"; exit 1; }
  ln -sfn "$job-attempt-$attempt" "$MOPD_DIR/job/logs/latest${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}"
  note "job $job, attempt $attempt, on ${#nodes[@]} nodes: ${nodes[*]}"
  note "logs in $MOPD_LOGS"
  complete=$MOPD_DIR/job/complete${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
  if [[ -f $complete ]]; then
    note "complete already, by job $(cat "$complete"): nothing to do"
    exit 0
  fi
  write_attach_script
  check_logs_are_shared
  load_secrets
  make_ray_token
  local before
  before=$(newest_checkpoint)
  start_nodes
  watch_nodes
  finish "$before"
}

load_secrets() {
  [[ -n ${MOPD_SECRETS:-} ]] || return 0
  set -a
  # shellcheck disable=SC1090
  source "$MOPD_SECRETS" || { note "ERROR: cannot read secrets file $MOPD_SECRETS"; exit 1; }
  set +a
}

# Whoever reaches Ray's port runs code as this user, and a cluster has other users.
make_ray_token() {
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$MOPD_LOGS/.ray-token
  (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
  trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
}

# A step of its own whose output comes back through srun, because a node that lacks the directory cannot log there.
check_logs_are_shared() {
  put "$MOPD_LOGS/token" "$job"
  # shellcheck disable=SC2016
  if ! srun --ntasks-per-node=1 bash -c '
    until [[ -f $1 ]]; do
      if ((SECONDS >= $2)); then echo "ERROR: node $SLURMD_NODENAME does not see $1"; exit 1; fi
      sleep 0.5
    done' _ "$MOPD_LOGS/token" "$MOPD_SILENT_SECONDS"; then
    note "ERROR: the log directory is not shared by all nodes: put MOPD_DIR=$MOPD_DIR (root of the site file, or --output)" \
      "on a file system that every node mounts"
    exit 1
  fi
}

start_nodes() {
  local options=(--ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}"
    --kill-on-bad-exit=1 --unbuffered --output="$MOPD_LOGS/%N.log")
  if [[ -n ${MOPD_IMAGE:-} ]]; then
    options+=(--container-image="$MOPD_IMAGE" --container-mounts="$MOPD_MOUNTS" --container-name="mopd-$SLURM_JOB_ID"
      --container-workdir="$MOPD_WORKDIR" --no-container-mount-home
      --container-env="$MOPD_CONTAINER_ENV") # these win over the image's own values, which else win over the job's
  fi
  export MOPD_CPUS=${SLURM_CPUS_ON_NODE:-1}
  srun "${options[@]}" bash "$MOPD_SCRIPTS/node.sh" &
  step=$!
}

# Until the step ends, or a node has been silent for too long. A silence counts only while this script itself can use the
# file system: when that hangs, nobody's signs of life arrive.
watch_nodes() {
  local -A beat=() since=()
  local node now looked
  for node in "${nodes[@]}"; do since[$node]=$SECONDS; done
  while kill -0 "$step" 2> /dev/null; do
    looked=$SECONDS
    : > "$MOPD_LOGS/beats/.batch"
    for node in "${nodes[@]}"; do
      now=$(cat "$MOPD_LOGS/beats/$node" 2> /dev/null)
      [[ $now == "${beat[$node]:-}" ]] || since[$node]=$SECONDS
      beat[$node]=$now
    done
    if ((SECONDS - looked > LOOK_EVERY)); then
      for node in "${nodes[@]}"; do since[$node]=$SECONDS; done
    fi
    for node in "${nodes[@]}"; do
      silent "$node" $((SECONDS - since[$node])) "${beat[$node]}" && return
    done
    sleep "$LOOK_EVERY" &
    wait $!
  done
}

# silent NODE SECONDS BEAT: true, and recorded as the failure, when that is too long.
silent() {
  local log=$MOPD_LOGS/$1.log
  if [[ -z $3 ]] && (($2 > MOPD_START_SECONDS)); then
    record_failure "$1" "has not started its task within $2 s" "$log"
  elif [[ -n $3 ]] && (($2 > MOPD_SILENT_SECONDS)); then
    record_failure "$1" "has given no sign of life for $2 s" "$log"
  else
    return 1
  fi
}

finish() {
  local status=0 code
  [[ -f $MOPD_LOGS/failed ]] || { wait "$step"; status=$?; }
  code=$(cat "$MOPD_LOGS/driver.exit" 2> /dev/null)
  if [[ -f $MOPD_LOGS/failed ]]; then
    mapfile -t failure < "$MOPD_LOGS/failed"
    fail_with "${failure[0]}" "${failure[1]}" "${failure[2]}"
  elif [[ $code == 0 ]]; then
    put "$complete" "$job"
    note "complete: $MOPD_RUN_DIR"
  elif [[ $code == 138 ]]; then # the signal was passed on, or the run's own deadline has come
    saved "$1"
  elif [[ -n $code ]]; then
    fail_with "$MOPD_HEAD_NODE" "driver ended with exit code $code" "$MOPD_LOGS/driver.log" "$code"
  else
    fail_with "$MOPD_HEAD_NODE" "step ended with exit code $status before the driver did" "$MOPD_LOGS/$MOPD_HEAD_NODE.log"
  fi
}

# saved CHECKPOINT: the run has stopped as asked; CHECKPOINT was its newest when this attempt began.
saved() {
  local reason
  if [[ -f $MOPD_LOGS/stop && $(cat "$MOPD_LOGS/stop") != walltime ]]; then
    note "saved and stopped as asked; to go on: sbatch $MOPD_DIR/job/job.sbatch"
  elif [[ $(newest_checkpoint) == "$1" ]]; then
    reason="no new checkpoint in this attempt: raise cluster.time_limit, cluster.stop_minutes or"
    fail_with "$MOPD_HEAD_NODE" "$reason train.checkpoint_must_save_by" "$MOPD_LOGS/driver.log"
  elif ((MOPD_MAX_RESTARTS == 0)); then
    note "saved at the time limit; to go on: sbatch $MOPD_DIR/job/job.sbatch"
  elif ((attempt >= MOPD_MAX_RESTARTS)); then
    note "ERROR: saved, but not queued again after cluster.max_restarts=$MOPD_MAX_RESTARTS restarts"
    exit 1
  else
    note "saved at $(newest_checkpoint); queueing the job again"
    scontrol requeue "$SLURM_JOB_ID" || exit 1
    sleep 60 & # Slurm ends this script
    wait $!
  fi
}

# Its name and when it was written: after a damaged one was passed over, a new one has the same name. Only names that the
# run itself gives count.
newest_checkpoint() {
  local path newest=""
  for path in "$MOPD_RUN_DIR"/checkpoints/step_*; do
    [[ ${path##*/} =~ ^step_[0-9]{6,}$ && -d $path ]] || continue
    ((${#path} < ${#newest})) || newest=$path # a longer number is a larger one
  done
  [[ -z $newest ]] || stat --format="${newest##*/}, written %y" "$newest"
}

# fail_with NODE REASON LOG [CODE]
fail_with() {
  note "FAILED: node $1: $2"
  note "log: $3"
  [[ ! -f $3 ]] || tail -n 25 "$3" | sed 's/^/  | /'
  exit "${4:-1}"
}

write_attach_script() {
  local container=""
  [[ -z ${MOPD_IMAGE:-} ]] || container="--container-name=mopd-$SLURM_JOB_ID "
  cat > "$MOPD_LOGS/attach.sh" << END
#!/usr/bin/env bash
# A shell on a node of job $job beside what runs there: attach.sh [NODE], by default the head.
exec srun --jobid=$SLURM_JOB_ID --overlap --pty --ntasks=1 --nodes=1 --nodelist="\${1:-$MOPD_HEAD_NODE}" ${container}bash
END
  chmod +x "$MOPD_LOGS/attach.sh"
}

main
