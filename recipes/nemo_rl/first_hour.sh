#!/usr/bin/env bash
# What only GPUs can show of the NeMo-RL engine, point by point, on one node of 8 GPUs, in NeMo-RL's container:
#
#   recipes/nemo_rl/first_hour.sh OUT          run in a directory that outlives the job; again: what has not passed
#   recipes/nemo_rl/first_hour.sh --dry-run    print the list, and the command of every run
#
# A point that fails is recorded and the next one runs. OUT/table.md and OUT/table.json have the figures; each point has
# a directory with its log and runs. Exit code 1: some point has not passed.
#
#   MODEL     student of the small points (Qwen/Qwen3-0.6B)
#   TEACHER   external teacher of its vocabulary (Qwen/Qwen3-1.7B)
#   TRAIN, EVAL  JSONL files of problems (the built-in arithmetic)
#   LIMIT     seconds for one run (900)
#   ONLY      names of the points to run (all)
# shellcheck disable=SC2329  # `point` calls functions by name
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
PYTHON=${PYTHON:-python}
CONFIG=configs/nemo/mopd-qwen3-4b-self-1n8g-megatron-tp2.yaml
MODEL=${MODEL:-Qwen/Qwen3-0.6B} TEACHER=${TEACHER:-Qwen/Qwen3-1.7B} LIMIT=${LIMIT:-900}
DATA=("data.train=${TRAIN:-arithmetic}" "data.eval=${EVAL:-arithmetic}")
SMALL=("model.path=$MODEL" "${DATA[@]}" train.num_steps=2 train.eval_every=0 nemo.gpus_per_node=2
  rollout.num_prompts_per_step=8 rollout.max_response_tokens=1024)
PEERS=("${SMALL[@]}" peers.when_no_success=plain) # a lesson in every step
UNCUT=(nemo.student.tensor=1 nemo.student.sequence=false)
SAME=("${SMALL[@]}" method=opd teacher.kind=frozen) # the teacher is the student and reads the same prompt
DTENSOR=(nemo.backend=dtensor nemo.batching=dynamic "${UNCUT[@]}")

DRY=false
[ "${1:-}" = --dry-run ] && DRY=true
if ! $DRY && { [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; }; then
  sed -n '2,/^set/{/^set/d;/^# shellcheck/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 2
fi
if $DRY; then OUT=OUT; else OUT=$(realpath -m "$1"); fi

checks() { "$PYTHON" recipes/nemo_rl/first_hour.py "$@"; }

# attempt WORD... : run it within the time limit, or print it.
attempt() {
  if $DRY; then
    printf '    %s\n' "$*"
  else
    timeout --kill-after=60 "$LIMIT" "$@" >&2
  fi
}

# train RUN OVERRIDE... : a run in RUN under the point's directory.
train() {
  local run=$1
  shift
  attempt "$PYTHON" recipes/run_mopd.py --config "$CONFIG" "$@" "run_dir=$OUT/$POINT/$run"
}

# value RUN KEY STEP : of a run's metrics.
value() { $DRY || checks value "$OUT/$POINT/$1" "$2" "$3"; }

# point NAME ABOVE|BELOW BOUND WHAT : run the function NAME; the last line that it prints is the measured value.
point() {
  local name=$1 side=$2 bound=$3 what=$4 found code
  [[ -z ${ONLY:-} || " $ONLY " == *" $name "* ]] || return 0
  POINT=$name
  if $DRY; then
    echo "$name: $what, $side $bound"
    "$name"
    return 0
  fi
  if checks passed "$OUT" "$name"; then
    echo "PASSED BEFORE  $name"
    return 0
  fi
  rm -rf "${OUT:?}/$name"
  mkdir -p "$OUT/$name"
  found=$("$name" 2>"$OUT/$name/log.txt")
  code=$?
  checks record "$OUT" "$name" "$side" "$bound" "$what" "$code" "$(tail -n 1 <<<"$found")"
}

starts() { train run "${PEERS[@]}" && value run sampler/gap 1; }

refit() {
  train run "${PEERS[@]}" "${UNCUT[@]}" teacher.kind=frozen train.num_steps=4 optimizer.learning_rate=1e-4 \
    optimizer.warmup_steps=0 && value run sampler/gap 4
}

alignment() { train run "${SAME[@]}" && value run loss 1; }
alignment_tensor_1() { train run "${SAME[@]}" "${UNCUT[@]}" && value run loss 1; }
alignment_context_2() {
  train run "${SAME[@]}" "${UNCUT[@]}" nemo.student.context=2 && value run loss 1
}
alignment_pipeline_2() {
  train run "${SAME[@]}" "${UNCUT[@]}" nemo.student.pipeline=2 && value run loss 1
}
alignment_all_cuts() {
  train run "${SAME[@]}" nemo.gpus_per_node=8 nemo.student.context=2 nemo.student.pipeline=2 &&
    value run loss 1
}
alignment_one_step_off() {
  train run "${PEERS[@]}" nemo.gpus_per_node=4 nemo.generation.gpus=2 rollout.lag=1 && value run sampler/gap 2
}
dtensor() { train run "${SAME[@]}" "${DTENSOR[@]}" && value run loss 1; }

shared_prompt() {
  attempt "$PYTHON" recipes/nemo_rl/first_hour.py shared-prompt "$OUT/$POINT/scores.json" --config "$CONFIG" \
    "${SMALL[@]}" && { $DRY || checks apart "$OUT/$POINT/scores.json"; }
}

resume() {
  local seeded=("${PEERS[@]}" nemo.generation.seeded=true)
  train whole "${seeded[@]}" train.num_steps=4 && train halves "${seeded[@]}" &&
    attempt "$PYTHON" recipes/run_mopd.py --resume "$OUT/$POINT/halves" train.num_steps=4 &&
    { $DRY || checks difference "$OUT/$POINT/whole" "$OUT/$POINT/halves" loss 3; }
}

resume_other_rate() {
  train run "${PEERS[@]}" &&
    attempt "$PYTHON" recipes/run_mopd.py --resume "$OUT/$POINT/run" train.num_steps=3 optimizer.learning_rate=5e-6 &&
    value run grad_norm 3
}

ema_at_rate_1() {
  local seeded=("${SMALL[@]}" "${UNCUT[@]}" nemo.generation.seeded=true optimizer.warmup_steps=0)
  train ema "${seeded[@]}" teacher.ema_rate=1.0 && train live "${seeded[@]}" teacher.kind=live &&
    { $DRY || checks difference "$OUT/$POINT/live" "$OUT/$POINT/ema" loss 2; }
}

external_memory() {
  attempt "$PYTHON" recipes/nemo_rl/first_hour.py teacher-memory "$OUT/$POINT/memory.json" --config "$CONFIG" \
    "${PEERS[@]}" teacher.kind=external "teacher.path=$TEACHER" && { $DRY || checks left "$OUT/$POINT/memory.json"; }
}
external_shared() {
  train run "${PEERS[@]}" teacher.kind=external "teacher.path=$TEACHER" && value run sampler/gap 2
}
external_apart() {
  train run "${PEERS[@]}" teacher.kind=external "teacher.path=$TEACHER" nemo.gpus_per_node=4 nemo.teacher_gpus=2 &&
    value run sampler/gap 2
}
generation_apart() {
  train run "${PEERS[@]}" nemo.gpus_per_node=4 nemo.generation.gpus=2 && value run sampler/gap 2
}
dtensor() { train run "${PEERS[@]}" "${DTENSOR[@]}" && value run sampler/gap 2; }

export_model() {
  train run "${PEERS[@]}" &&
    attempt "$PYTHON" -m mopd_nemo export "$OUT/$POINT/run" --output "$OUT/$POINT/model" &&
    attempt "$PYTHON" -m mopd_nemo eval --checkpoint "$OUT/$POINT/model" --output "$OUT/$POINT/eval.json" \
      data.num_eval=8 eval.num_samples=1 rollout.max_response_tokens=64 && { $DRY || echo 1; }
}

memory() {
  local watcher=""
  if ! $DRY; then
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop=1 >"$OUT/$POINT/used.txt" 2>/dev/null &
    watcher=$!
  fi
  train run "${DATA[@]}" train.num_steps=3 train.eval_every=0
  local code=$?
  [ -z "$watcher" ] || kill "$watcher"
  [ $code -eq 0 ] && { $DRY || checks memory "$OUT/$POINT/run" "$OUT/$POINT/used.txt"; }
}
utilisation() { $DRY || checks value "$OUT/memory/run" mfu 3; }
score_time() { $DRY || checks ratio "$OUT/memory/run" seconds/score seconds/update 3; }

point starts below 0.05 "sampler/gap of step 1: it starts, and vLLM and Megatron agree on the weights"
point refit below 0.05 "sampler/gap of step 4 after updates at rate 1e-4 on two data-parallel ranks"
point alignment below 0.001 "loss of step 1 against itself, packed, Transformer Engine, TP 2"
point alignment_tensor_1 below 0.001 "the same, TP 1"
point alignment_context_2 below 0.001 "the same, CP 2"
point alignment_pipeline_2 below 0.001 "the same, PP 2"
point alignment_all_cuts below 0.001 "the same, TP 2, CP 2, PP 2 on 8 GPUs"
point alignment_dtensor below 0.001 "the same, DTensor"
point shared_prompt below 0.05 "mean difference of log-probabilities, one prompt read once and with each response"
point resume below 0.2 "relative difference of step 3's loss, resumed and not, with seeds"
point resume_other_rate above 0 "grad_norm of step 3, resumed with another learning rate"
point ema_at_rate_1 below 0.1 "relative difference of step 2's loss, EMA at rate 1 and live teacher, with seeds"
point external_memory below 0.1 "GPU memory of a shared external teacher after offload, of that before"
point external_shared below 0.05 "sampler/gap of step 2 with an external teacher on the same GPUs"
point external_apart below 0.05 "sampler/gap of step 2 with an external teacher on GPUs of its own"
point generation_apart below 0.05 "sampler/gap of step 2 with vLLM on GPUs of its own"
point one_step_off below 0.1 "sampler/gap of step 2, whose rollouts were drawn while step 1 was learned from"
point dtensor below 0.05 "sampler/gap of step 2 with DTensor"
point export_model above 0 "a Hugging Face model is made of a checkpoint and evaluated"
point memory below 1.0 "peak of GPU memory, of the estimate before submission, Qwen3-4B on 8 GPUs"
point utilisation above 0.1 "mfu of step 3 of that run"
point score_time below 2 "seconds of scoring, of those of the update, in step 3 of that run"

$DRY && exit 0
checks table "$OUT"
