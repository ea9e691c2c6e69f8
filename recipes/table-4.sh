#!/usr/bin/env bash
# Table 4: what the teacher reads, Qwen3-8B.
#   recipes/table-4.sh DIR [--dry-run] [--seeds 0,1,2] [KEY=VALUE]...   submits its runs; later, compares them
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/paper_table.py" 4 "$@"
