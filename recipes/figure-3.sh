#!/usr/bin/env bash
# Figure 3: training problems solved at least once, SDPO and MOPD on LiveCodeBench. Its runs are those of Table 5.
#   recipes/figure-3.sh DIR   writes DIR/figure-3.html
set -euo pipefail
runs=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python -m mopd_nemo report "$runs"/{sdpo,mopd}-qwen3-8b-livecodebench-1n8g-tp2/seed=0 --output "$runs/figure-3.html"
