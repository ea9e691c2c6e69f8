#!/usr/bin/env bash
# Table 3: tool use, Qwen3-8B.
#   recipes/table-3.sh DIR [--dry-run] [--seeds 0,1,2] [KEY=VALUE]...   submits its runs; later, compares them
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/paper_table.py" 3 "$@"
