#!/usr/bin/env bash
# Table 7: teacher-signal quality, Qwen3-4B on LiveCodeBench (also Figure 4).
#   recipes/table-7.sh DIR [--dry-run] [--seeds 0,1,2] [KEY=VALUE]...   submits its runs; later, compares them
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/paper_table.py" 7 "$@"
