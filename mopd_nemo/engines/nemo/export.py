"""A Megatron checkpoint of NeMo-RL as a Hugging Face model, in an interpreter that has Megatron-Bridge.

python -m mopd_nemo.engines.nemo.export CHECKPOINT OUTPUT [merge]
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml


def export(checkpoint: Path, output: Path, merge: bool) -> None:
    """Write the Hugging Face model of `checkpoint/policy` by NeMo-RL's own converters.

    Args:
        merge: a whole model where the checkpoint holds adapters; else they alone, for PEFT.
    """
    policy = yaml.safe_load((checkpoint / "policy" / "config.yaml").read_text())["policy"]
    weights = max((checkpoint / "policy" / "weights").glob("iter_*"))
    tokenizer = checkpoint / "policy" / "tokenizer"
    if policy["megatron_cfg"].get("peft", {}).get("enabled"):
        converter = _adapters_converter()
        convert = converter.merge_lora_to_hf if merge else converter.export_lora_adapter_to_hf
        convert(
            base_ckpt=str(_base(weights)),
            adapter_ckpt=str(weights),
            hf_model_name=policy["model_name"],
            hf_ckpt_path=str(output),
        )
        shutil.copytree(tokenizer, output, dirs_exist_ok=True)
        return
    from nemo_rl.models.megatron.community_import import export_model_from_megatron

    export_model_from_megatron(
        hf_model_name=policy["model_name"],
        input_path=str(weights),
        output_path=str(output),
        hf_tokenizer_path=str(tokenizer),
        hf_overrides=policy.get("hf_overrides") or {},
    )


def _base(weights: Path) -> Path:
    """The Megatron checkpoint of the model below the adapters, as NeMo-RL converted it when the run started."""
    found = Path(yaml.safe_load((weights / "run_config.yaml").read_text())["checkpoint"]["pretrained_checkpoint"])
    base = max(found.glob("iter_*"), default=found)
    if not (base / "run_config.yaml").is_file():
        raise SystemExit(
            f"{weights}: the model below its adapters was at {found} when the run started, and is not there now: "
            "start a run from the same model.path, which converts it again (NRL_MEGATRON_CHECKPOINT_DIR says where to)"
        )
    return base


def _adapters_converter() -> Any:
    """NeMo-RL's converter of adapters, which is a script of its checkout and in no package."""
    import nemo_rl

    script = Path(nemo_rl.__path__[0]).parent / "examples" / "converters" / "convert_lora_to_hf.py"
    spec = importlib.util.spec_from_file_location("convert_lora_to_hf", script)
    if spec is None or spec.loader is None or not script.is_file():
        raise SystemExit(f"{script}: NeMo-RL's converter of adapters is not there; export with a checkout of NeMo-RL")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]), merge="merge" in sys.argv[3:])
