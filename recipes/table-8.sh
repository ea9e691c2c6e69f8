#!/usr/bin/env bash
# Table 8: diversity at step 50 on LiveCodeBench (also Figure 5).
#   recipes/table-8.sh DIR [--dry-run] [--seeds 0,1,2] [KEY=VALUE]...   submits its runs; later, compares them
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/paper_table.py" 8 "$@"
