#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec slurm/submit.sh --config configs/beyond/mopd-qwen3-30b-a3b-livecodebench-4n8g-tp2ep8.yaml "$@"
