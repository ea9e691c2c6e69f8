"""`mopd estimate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mopd_nemo.commands import ConfigFile, Overrides, print_table
from mopd_nemo.config import UserError
from mopd_nemo.terminal import Terminal

CARDS = {"A100-40": 40, "A100": 80, "H100": 80, "H200": 141, "L40S": 48, "RTX4090": 24, "RTX5090": 32}
"""GB of memory, by NVIDIA's data sheets."""
REMEDIES = {
    "generate": "rollout.batch_size, generation.gpu_memory_utilization",
    "score": "train.tokens_per_micro_batch, rollout.num_prompts_per_step",
    "update": "train.activation_checkpointing=true, train.tokens_per_micro_batch",
    "optimiser step": "optimizer.moments=int8, optimizer.weights=bfloat16, teacher.offload=true",
}
"""What helps the local engine. A cluster's remedies are in the checks of `mopd submit`."""


def estimate(
    config_file: ConfigFile,
    overrides: Overrides = None,
    card: Annotated[
        str, typer.Option(help=f"A card ({', '.join(CARDS)}), a number of GB, or `here`: this machine's device.")
    ] = "here",
) -> None:
    """How much memory a run needs on its fullest device, by phase and part. Loads nothing.

    mopd estimate --config configs/quickstart.yaml --card H100
    """
    from mopd_nemo.config.load import load_config
    from mopd_nemo.engines import estimate_memory
    from mopd_nemo.engines.memory import shortage
    from mopd_nemo.outlook import device_memory

    config = load_config(config_file, overrides or [])
    device, gb = device_memory(config) if card == "here" else ("cuda", _gb_of(card))
    need = estimate_memory(config, device, gb)
    if need is None:
        paths = [f"model.path={config.model.path}", *(t.path for t in config.every_teacher.values() if t.path)]
        raise UserError(
            f"{', '.join(paths)}: sizes are unknown: give a directory with the config.json of a model built like "
            "Llama or Qwen3"
        )
    parts = list(dict.fromkeys(part for found in need.phases.values() for part in found))
    phases = [name for name, found in need.phases.items() if found]
    rows = [
        [part, *(f"{need.phases[name][part]:.3g}" if part in need.phases[name] else "" for name in phases)]
        for part in parts
    ]
    rows.append(["together", *(f"{need[name]:.3g}" for name in phases)])
    console = Terminal()
    title = f"GB on {'the fullest GPU' if device == 'cuda' else 'this machine'} of {gb:.3g} GB, estimated"
    print_table([config.model.path, *phases], rows, console, title=title)
    for line in shortage(need, gb):
        remedy = f": change {REMEDIES[line.split(' may')[0]]}" if config.engine == "local" else ""
        console.print(f"{line}{remedy}", style="yellow", soft_wrap=True)
    if need.peak <= gb:
        console.print(f"fits: {gb - need.peak:.3g} GB are left", soft_wrap=True)


def _gb_of(card: str) -> float:
    if card in CARDS:
        return float(CARDS[card])
    try:
        gb = float(card)
    except ValueError:
        gb = 0.0
    if not 0 < gb < float("inf"):
        raise UserError(f"--card {card}: give one of {', '.join(CARDS)}, a number of GB, or `here`")
    return gb
