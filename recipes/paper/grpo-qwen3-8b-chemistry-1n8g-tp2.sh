#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec slurm/submit.sh --config configs/paper/grpo-qwen3-8b-chemistry-1n8g-tp2.yaml "$@"
