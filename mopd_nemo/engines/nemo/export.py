"""A Megatron checkpoint of NeMo-RL as a Hugging Face model, in an interpreter that has Megatron-Bridge.

python -m mopd_nemo.engines.nemo.export CHECKPOINT OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml


def export(checkpoint: Path, output: Path) -> None:
    """Write the Hugging Face model of `checkpoint/policy` by NeMo-RL's own converter."""
    from nemo_rl.models.megatron.community_import import export_model_from_megatron

    policy = yaml.safe_load((checkpoint / "policy" / "config.yaml").read_text())["policy"]
    weights = max((checkpoint / "policy" / "weights").glob("iter_*"))
    tokenizer = checkpoint / "policy" / "tokenizer"
    export_model_from_megatron(
        hf_model_name=policy["model_name"],
        input_path=str(weights),
        output_path=str(output),
        hf_tokenizer_path=str(tokenizer),
        hf_overrides=policy.get("hf_overrides") or {},
    )


if __name__ == "__main__":
    export(*map(Path, sys.argv[1:]))
