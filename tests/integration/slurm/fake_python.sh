#!/usr/bin/env bash
# A fake driver. It notes how it was called, saves a "checkpoint", and goes on until it is told to stop or a file `finish`
# appears in its run directory.
[[ $2 == *ray_nodes ]] && exit 0
trap 'mkdir -p "$MOPD_RUN_DIR/checkpoints/step_1$(date +%s%N)"; exit 138' USR1
mkdir -p "$MOPD_RUN_DIR"
echo "$*" >> "$MOPD_RUN_DIR/calls"
env > "$MOPD_RUN_DIR/environment"
touch "$MOPD_RUN_DIR/config.yaml"
until [[ -f $MOPD_RUN_DIR/finish ]]; do
  sleep 0.1
done
exit "$(cat "$MOPD_RUN_DIR/finish")"
