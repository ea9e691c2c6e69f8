#!/usr/bin/env bash
# Table 9: seconds a step, Qwen3-8B; the paper's update is our score and update.
#   recipes/table-9.sh DIR [--dry-run] [--seeds 0,1,2] [KEY=VALUE]...   submits its runs; later, compares them
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/paper_table.py" 9 "$@"
