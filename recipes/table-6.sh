#!/usr/bin/env bash
# Table 6: teacher and student, Qwen3-14B and Qwen3-4B.
#   recipes/table-6.sh DIR [--dry-run] [--seeds 0,1,2] [KEY=VALUE]...   submits its runs; later, compares them
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/paper_table.py" 6 "$@"
