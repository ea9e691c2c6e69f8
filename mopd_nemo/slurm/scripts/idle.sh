#!/usr/bin/env bash
# The driver of an interactive job: does nothing until it is told to stop.
trap 'exit 0' USR1
echo "Ray is up at $RAY_ADDRESS; attach with $MOPD_LOGS/attach.sh, end with: touch $MOPD_LOGS/stop"
while :; do sleep 1; done
