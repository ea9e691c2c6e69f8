#!/usr/bin/env bash
# Run the config of this name and check the metrics of the finished run, as the scripts of NeMo-RL's tests/test_suites do,
# with NeMo-RL's own json_dump_tb_logs.py and check_metrics.py. In NeMo-RL's container or checkout:
#
#   recipes/nemo_rl/distillation-peers-qwen3-4b-self-1n8g-megatron-tp2-pack.sh OUT [KEY=VALUE]...
#
# OUT outlives the job: called again, the run goes on from its newest checkpoint, and a finished one is only checked.
# The bounds are what must hold of any sound run; none was measured, since nothing here has run on GPUs.
set -euo pipefail

# ===== BEGIN CONFIG =====
NUM_NODES=1
STEPS_PER_RUN=20
MAX_STEPS=${MAX_STEPS:-20}
NUM_RUNS=$(((MAX_STEPS + STEPS_PER_RUN - 1) / STEPS_PER_RUN))
NUM_MINUTES=120
# ===== END CONFIG =====

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 2
fi
OUT=$(realpath -m "$1")
shift
HERE=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
NAME=$(basename "${BASH_SOURCE[0]}" .sh)
PYTHON=${PYTHON:-python}
export NEMO_RL=${NEMO_RL:-$("$PYTHON" -c 'import nemo_rl, pathlib; print(pathlib.Path(nemo_rl.__file__).parents[1])')}
mkdir -p "$OUT/logs"

# reached : write OUT/metrics.json and print the last step with a loss.
reached() {
  if [ -z "$(find "$OUT/logs" -name '*tfevents*' -print -quit)" ]; then
    echo 0
    return
  fi
  "$PYTHON" "$NEMO_RL/tests/json_dump_tb_logs.py" "$OUT/logs" --output_path "$OUT/metrics.json" >/dev/null
  "$PYTHON" -c 'import json, sys
print(max(map(int, json.load(open(sys.argv[1])).get("train/loss", [0]))))' "$OUT/metrics.json"
}

if [ "$(reached)" -lt "$MAX_STEPS" ]; then
  "$PYTHON" "$HERE/run_peer_distillation.py" \
    --config "$HERE/$NAME.yaml" \
    cluster.num_nodes="$NUM_NODES" \
    distillation.max_num_steps="$MAX_STEPS" \
    logger.log_dir="$OUT/logs" \
    logger.tensorboard_enabled=true \
    checkpointing.checkpoint_dir="$OUT/checkpoints" \
    "$@" 2>&1 | tee -a "$OUT/run.log"
fi
LAST=$(reached)
if [ "$LAST" -lt "$MAX_STEPS" ]; then
  echo "step $LAST of $MAX_STEPS was reached: call this again ($NUM_RUNS jobs of $NUM_MINUTES minutes were planned)"
  exit 1
fi
echo "step $LAST was reached"
"$PYTHON" "$NEMO_RL/tests/check_metrics.py" "$OUT/metrics.json" \
  'min(data["train/loss"]) >= 0' \
  'mean(data["train/loss"]) > 0' \
  'max(data["train/loss"]) < 5' \
  'max(data["train/grad_norm"]) < 100' \
  'mean(data["peer_teacher/signal"]) > 0.1' \
  'max(data["peer_teacher/context/overflow"]) < 0.5' \
  'max(data["peer_teacher/outcome/verifier_error"]) < 0.05' \
  'min(data["train/student/topk_mass"]) > 0.5'
