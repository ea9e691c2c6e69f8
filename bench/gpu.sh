#!/usr/bin/env bash
# Everything that waits for a GPU, in one run of under nine minutes: kernel tests, losses beside Liger, TRL and plain
# products, tree attention beside padded, a whole step by phase, and what fits. One table, OUT/gpu.json, OUT/*.jsonl.
#
#     bench/gpu.sh [--toy] [--wheels DIR] [--out DIR] [PART ...]      PART: tests losses attention step fits
#
# Needs one H100 or H200, torch, Triton and transformers, and no network: models are made on the spot. Each part has a
# time limit and ends on its own failure; the others run all the same. --toy: a CPU's sizes, seconds.
#
# Packages that the machine lacks travel as wheels (7 MB; made where there is a network, for the Python of the GPU's
# machine):
#
#     bench/gpu.sh wheels DIR [3.12]
#
# --wheels DIR unpacks them beside the script's results and puts them before what is installed.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

if [ "${1:-}" = wheels ]; then
  directory=${2:?a directory for the wheels} version=${3:-3.12}
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$directory" \
    pydantic==2.13.4 pydantic-core==2.46.4 annotated-types typing-inspection omegaconf==2.3.0 math-verify==0.9.0 \
    latex2sympy2-extended==1.11.0 hypothesis sortedcontainers \
    trl==1.16.0 liger-kernel==0.8.5 datasets==5.2.0 multiprocess dill &&
    "$python" -m pip wheel --quiet --no-deps -w "$directory" antlr4-python3-runtime==4.9.3
  exit
fi

toy='' wheels='' out=$root/runs/gpu parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --toy) toy=--toy ;;
    --wheels) wheels=$(cd "$2" && pwd) || exit; shift ;;
    --out) out=$2; shift ;;
    *) parts+=("$1") ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(tests losses attention step fits)
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$root" || exit
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTORCH_ALLOC_CONF=expandable_segments:True  # "what fits" is about size, not about fragments
if [ -n "$wheels" ]; then
  for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$out/packages" || exit; done
  export PYTHONPATH=$out/packages:$PYTHONPATH
fi

declare -A limits=([tests]=100 [losses]=130 [attention]=110 [step]=100 [fits]=95)  # 535 s in all
for part in "${parts[@]}"; do
  rm -f "$out/$part.jsonl"
  timeout --kill-after=5 "${limits[$part]:?no such part: $part}" \
    "$python" bench/gpu.py "$part" --out "$out" ${toy:+"$toy"} 2>"$out/$part.err" || tail -3 "$out/$part.err"
done
"$python" bench/gpu.py table --out "$out" ${toy:+"$toy"}
