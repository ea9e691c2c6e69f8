#!/usr/bin/env bash
# Table 2: sciences, Qwen3-8B (the paper's text calls it Table 4).
#   recipes/table-2.sh DIR [--dry-run] [--seeds 0,1,2] [KEY=VALUE]...   submits its runs; later, compares them
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/paper_table.py" 2 "$@"
