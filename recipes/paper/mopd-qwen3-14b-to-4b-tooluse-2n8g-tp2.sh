#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec slurm/submit.sh --config configs/paper/mopd-qwen3-14b-to-4b-tooluse-2n8g-tp2.yaml "$@"
