"""`mopd estimate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from mopd_nemo.commands import ConfigFile, Overrides, print_table
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.teacher import key_of
from mopd_nemo.engines.memory import Estimate, shortage
from mopd_nemo.terminal import Terminal

CARDS = {"A100-40": 40, "A100": 80, "H100": 80, "H200": 141, "L40S": 48, "RTX4090": 24, "RTX5090": 32}
"""GB of memory, by NVIDIA's data sheets."""
MARGIN = 1.1
"""What is needed may be this much more than the estimate."""


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
    from mopd_nemo.outlook import device_memory

    config = load_config(config_file, overrides or [])
    device, gb = device_memory(config) if card == "here" else ("cuda", _gb_of(card))
    need = _needed(config, device, gb)
    console = Terminal()
    _show_parts(
        config.model.path, need, f"{'the fullest GPU' if device == 'cuda' else 'this machine'} of {gb:.3g}", console
    )
    for line in shortage(need, gb):
        console.print(line, style="yellow", soft_wrap=True)
    if need.peak <= gb:
        close = gb < MARGIN * need.peak
        console.print(f"fits{', barely' if close else ''}: {gb - need.peak:.3g} GB are left", soft_wrap=True)
        if close:
            doubt = "the estimate may be a tenth too low, and what the device needs for itself comes on top"
            console.print(doubt, style="yellow", soft_wrap=True)
    elif config.engine == "local":  # a cluster's remedies are in the checks of `mopd submit`
        helps = _what_helps(config_file, overrides or [], config, need, device, gb)
        if helps:
            columns = ["with these settings", *_taking_place(need)]
            print_table(columns, [row for _, row in helps], console, title="what helps, in GB")
        if not helps:
            console.print("no setting helps: choose a smaller model, or engine=nemo on several GPUs", soft_wrap=True)
        elif helps[0][0] > gb:
            console.print("none is enough alone: set several, or choose a smaller model", soft_wrap=True)


def _needed(config: Config, device: str, gb: float) -> Estimate:
    """The estimate.

    Raises:
        UserError: sizes of a model are unknown, or it lacks layers that `lora.targets` names.
    """
    from mopd_nemo.embedded import resolve_model_path
    from mopd_nemo.engines import check_adapters, estimate_memory
    from mopd_nemo.engines.architecture import find_model

    need = estimate_memory(config, device, gb)
    if need is None:
        raise UserError(
            f"{' and '.join(_unknown(config))}: its sizes are unknown: give a directory with the config.json of a "
            "model built like Llama or Qwen3"
        )
    if find_model(resolve_model_path(config.model.path), None):
        check_adapters(config)
    return need


def _taking_place(need: Estimate) -> list[str]:
    """The phases that a step has."""
    return [name for name, parts in need.phases.items() if parts]


def _show_parts(model: str, need: Estimate, where: str, console: Terminal) -> None:
    phases = _taking_place(need)
    parts = dict.fromkeys(part for found in need.phases.values() for part in found)
    rows = [
        [part, *(f"{need.phases[name][part]:.3g}" if part in need.phases[name] else "" for name in phases)]
        for part in parts
    ]
    rows.append(["together", *(f"{need[name]:.3g}" for name in phases)])
    print_table([model, *phases], rows, console, title=f"GB on {where} GB, estimated")
    if need.host:
        console.print(f"and {need.host:.3g} GB of host memory for what is offloaded", soft_wrap=True)


def _what_helps(
    file: Path, overrides: list[str], config: Config, need: Estimate, device: str, gb: float
) -> list[tuple[float, list[str]]]:
    """Settings that lower a phase that is too large, best first: the peak with them, and a row of the table."""
    from mopd_nemo.config.load import load_config
    from mopd_nemo.engines import estimate_memory

    short = [phase for phase in need.phases if need[phase] > gb]
    found: list[tuple[float, list[str]]] = []
    for setting in _remedies(config):
        try:
            changed = load_config(file, [*overrides, *setting.split()])
        except UserError:  # it does not go with the others
            continue
        with_it = estimate_memory(changed, device, gb)
        if with_it is not None and any(with_it[phase] < 0.99 * need[phase] for phase in short):
            columns = [f"{with_it[phase]:.3g}" for phase, parts in need.phases.items() if parts]
            found.append((with_it.peak, [setting, *columns]))
    return sorted(found)


def _remedies(config: Config) -> Iterator[str]:
    """Settings that may make a run of the local engine smaller."""
    yield "lora.rank=16"
    yield "optimizer.moments=int8"
    if config.model.dtype == "bfloat16":
        yield "optimizer.weights=bfloat16"
    else:
        yield "model.dtype=bfloat16"
        yield "model.dtype=bfloat16 optimizer.weights=bfloat16"
    yield "teacher.kind=live"
    yield "teacher.offload=true"
    yield "reference.offload=true"
    yield "train.activation_checkpointing=true"
    for key in ("rollout.batch_size", "rollout.num_prompts_per_step", "train.tokens_per_micro_batch"):
        block, name = key.split(".")
        yield f"{key}={max(getattr(getattr(config, block), name) // 2, 1)}"
    yield f"generation.gpu_memory_utilization={config.generation.gpu_memory_utilization / 2:g}"


def _unknown(config: Config) -> Iterator[str]:
    """Models whose sizes are unknown, with their keys."""
    from mopd_nemo.engines.architecture import architecture_of

    paths = {"model.path": config.model.path}
    paths |= {f"{key_of(name)}.path": one.path for name, one in config.every_teacher.items() if one.path}
    return (f"{key}={path}" for key, path in paths.items() if architecture_of(path) is None)


def _gb_of(card: str) -> float:
    name = card.upper()
    if name in CARDS:
        return float(CARDS[name])
    try:
        gb = float(name.removesuffix("GB"))
    except ValueError:
        gb = 0.0
    if not 0 < gb < float("inf"):
        raise UserError(f"--card {card}: give one of {', '.join(CARDS)}, a number of GB, or `here`")
    return gb
