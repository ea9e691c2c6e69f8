#!/usr/bin/env bash
# `mopd submit` of this checkout, from its environment if it has one:
#   slurm/submit.sh --config configs/quickstart.yaml --dry-run
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -x $checkout/.venv/bin/mopd ]]; then
  exec "$checkout/.venv/bin/mopd" submit "$@"
fi
command -v mopd > /dev/null || { echo "mopd is not installed: run \`make .venv/ready\` in $checkout first" >&2; exit 2; }
exec mopd submit "$@"
