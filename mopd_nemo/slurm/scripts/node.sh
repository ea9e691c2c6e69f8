#!/usr/bin/env bash
# What every node of a job runs, inside the container if there is one. The first is the head: it starts Ray, calls the
# roll, and runs the driver. The others join Ray and wait until the driver has ended.
set -uo pipefail
# shellcheck source=lib.sh
source "$MOPD_SCRIPTS/lib.sh"

node=$SLURMD_NODENAME
job=$SLURM_JOB_ID
terminated=""
ray=""
driver=""

main() {
  trap 'terminated=yes' TERM
  beat &
  ulimit -Sn "$(most_files)"
  set +u # environments' own scripts are not written for it
  [[ -z ${MOPD_SETUP:-} ]] || eval "$MOPD_SETUP" || fail "setup of the site file ended with an error"
  set -u
  export PYTHONPATH=$MOPD_CODE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  address=$(address_of "$node")
  note "node $node at $address"
  local name
  for name in "${!SLURM_@}" "${!PMI_@}" "${!PMIX_@}"; do unset "$name"; done # else they end up in every Ray worker
  if [[ $node == "$MOPD_HEAD_NODE" ]]; then run_head; else run_worker; fi
}

beat() {
  local number=0
  while kill -0 $$ 2> /dev/null; do
    echo $((++number)) > "$MOPD_LOGS/beats/$node"
    sleep 2
  done
}

# Ray opens many files; as many as allowed, up to what it recommends.
most_files() {
  local hard
  hard=$(ulimit -Hn)
  if [[ $hard == unlimited ]] || ((hard > 65535)); then echo 65535; else echo "$hard"; fi
}

# fail REASON: Slurm ends the other nodes' tasks when this one ends with an error.
fail() {
  [[ -z $terminated ]] || { note "ended by Slurm"; exit 143; }
  note "ERROR: $1"
  record_failure "$node" "$1" "$MOPD_LOGS/$node.log"
  exit 1
}

run_head() {
  if [[ -n ${MOPD_RAY:-} ]]; then
    check_ports
    start_ray --head --port="$MOPD_PORT" --include-dashboard=false --ray-client-server-port=$((MOPD_PORT + 1))
    wait_for "Ray head" listens "$address" "$MOPD_PORT"
    put "$MOPD_LOGS/head" "$address:$MOPD_PORT"
    export RAY_ADDRESS=$address:$MOPD_PORT
    python -m mopd_nemo.slurm.ray_nodes --nodes "$MOPD_NODES" --gpus "$MOPD_GPUS" --seconds "$MOPD_START_SECONDS" \
      --see "$MOPD_LOGS/token" || fail "not every node has joined Ray"
  fi
  start_driver
  local asked=""
  while kill -0 "$driver" 2> /dev/null; do
    if [[ -z $asked && -f $MOPD_LOGS/stop ]]; then
      note "asking the driver to save and stop"
      kill -USR1 "$driver"
      asked=yes
    fi
    [[ -z $ray ]] || kill -0 "$ray" 2> /dev/null || fail "Ray head has ended: see $ray_logs"
    sleep 1
  done
  wait "$driver"
  local code=$?
  note "driver ended with exit code $code"
  put "$MOPD_LOGS/driver.exit" "$code"
  stop_ray
}

run_worker() {
  check_ports
  wait_for "the head's address" test -f "$MOPD_LOGS/head"
  start_ray --address="$(cat "$MOPD_LOGS/head")"
  until [[ -f $MOPD_LOGS/driver.exit ]]; do
    if ! kill -0 "$ray" 2> /dev/null; then
      wait "$ray"
      fail "Ray worker has ended with exit code $?: see $ray_logs"
    fi
    sleep 1
  done
  stop_ray
}

stop_ray() {
  [[ -n $ray ]] || return 0
  kill "$ray" 2> /dev/null
  wait "$ray" 2> /dev/null
  return 0
}

# start_ray OPTION...: as a child, so that its end is noticed.
start_ray() {
  ray_logs=/tmp/ray-$job/session_latest/logs
  local temporary=()
  [[ $1 != --head ]] || temporary=(--temp-dir="/tmp/ray-$job")
  ray start "$@" "${temporary[@]}" --block --disable-usage-stats --node-ip-address="$address" \
    --num-cpus="$MOPD_CPUS" --num-gpus="$MOPD_GPUS" \
    --resources="{\"worker_units\": ${MOPD_GPUS}, \"slurm_managed_ray_cluster\": 1}" \
    --node-manager-port=$((MOPD_PORT + 2)) --object-manager-port=$((MOPD_PORT + 3)) \
    --runtime-env-agent-port=$((MOPD_PORT + 4)) --dashboard-agent-grpc-port=$((MOPD_PORT + 5)) \
    --dashboard-agent-listen-port=$((MOPD_PORT + 6)) --metrics-export-port=$((MOPD_PORT + 7)) \
    --min-worker-port=$((MOPD_PORT + 800)) --max-worker-port=$((MOPD_PORT + 1799)) &
  ray=$!
}

# A port inside the ephemeral range may be taken by any outgoing connection between Ray's choosing and binding it.
check_ports() {
  local low high last=$((MOPD_PORT + 1799))
  read -r low high < /proc/sys/net/ipv4/ip_local_port_range
  if ((last >= low && MOPD_PORT <= high)); then
    fail "ports $MOPD_PORT-$last overlap this node's ephemeral range $low-$high: change cluster.port"
  fi
  if listens "$address" "$MOPD_PORT" || listens "$address" $((MOPD_PORT + 2)); then
    fail "port $MOPD_PORT or $((MOPD_PORT + 2)) is in use: another Ray on this node? Use whole nodes, or change cluster.port"
  fi
}

# wait_for WHAT TEST...: until the test passes; ends the task when it takes too long.
wait_for() {
  local what=$1 deadline=$((SECONDS + MOPD_START_SECONDS))
  shift
  until "$@"; do
    [[ -z $ray ]] || kill -0 "$ray" 2> /dev/null || fail "Ray has ended at once: see $ray_logs"
    ((SECONDS < deadline)) || fail "waited $MOPD_START_SECONDS s for $what (cluster.start_minutes)"
    sleep 0.5
  done
}

start_driver() {
  local command
  case $MOPD_TASK in
    interactive) command=(bash "$MOPD_SCRIPTS/idle.sh") ;;
    eval) command=(python -m mopd_nemo eval --config "$MOPD_DIR/job/config.yaml" --output "$MOPD_RUN_DIR/eval.json") ;;
    *) command=(python -m mopd_nemo train)
      if [[ -f $MOPD_RUN_DIR/config.yaml ]]; then
        command+=(--resume "$MOPD_RUN_DIR")
      else
        command+=(--config "$MOPD_DIR/job/config.yaml" "run_dir=$MOPD_RUN_DIR" "seed=$MOPD_SEED")
      fi ;;
  esac
  note "driver: ${command[*]}"
  cd "$MOPD_WORKDIR" || fail "no directory $MOPD_WORKDIR here: add it to the mounts of the site file"
  "${command[@]}" > "$MOPD_LOGS/driver.log" 2>&1 &
  driver=$!
}

main
