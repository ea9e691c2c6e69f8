#!/usr/bin/env bash
# Table 10: SDPO and MOPD on the four sciences, three seeds each; then `mopd compare RUN/seed=*`.
set -euo pipefail
for method in sdpo mopd; do
  for science in biology chemistry physics materials; do
    "$(dirname "${BASH_SOURCE[0]}")/$method-qwen3-8b-$science-1n8g-tp2.sh" --seeds 0,1,2 "$@"
  done
done
