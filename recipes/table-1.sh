#!/usr/bin/env bash
# Table 1: mathematics, Qwen3-4B.
#   recipes/table-1.sh DIR [--dry-run] [--seeds 0,1,2] [KEY=VALUE]...   submits its runs; later, compares them
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/paper_table.py" 1 "$@"
