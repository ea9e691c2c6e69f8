#!/usr/bin/env bash
# Table 10: sciences, Qwen3-8B, over three seeds (the paper's numbers are missing from its text).
#   recipes/table-10.sh DIR [--dry-run] [--seeds 0,1,2] [KEY=VALUE]...   submits its runs; later, compares them
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/paper_table.py" 10 "$@"
