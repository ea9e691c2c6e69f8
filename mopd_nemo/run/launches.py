"""`launches.jsonl`: who trained in a run, one row a process. When, where, on what, with which code and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mopd_nemo
from mopd_nemo.config import Config
from mopd_nemo.files import write_rows
from mopd_nemo.run.directory import RunDirectory

PACKAGES = ("torch", "transformers", "vllm", "nemo-rl", "megatron-core")
"""Whose versions are recorded, where they are installed."""


def record_launch(run: RunDirectory, config: Config, step: int) -> None:
    """Record this process, which goes on from `step`."""
    write_rows(run.launches_file, [*run.rows(run.launches_file), {"step": step, **this_launch(config)}])


def this_launch(config: Config) -> dict[str, Any]:
    """What is known of this process; None where something is not."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "hardware": _hardware(config),
        "gpus": _num_gpus(config),
        "command": _command(sys.argv),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {"mopd-nemo": mopd_nemo.__version__}
        | {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _hardware(config: Config) -> str:
    if config.engine == "nemo":
        return f"{config.nemo.num_nodes} x {config.nemo.gpus_per_node} GPUs"
    import torch

    from mopd_nemo.engines.local.model import resolve_device

    device = resolve_device(config.model.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _num_gpus(config: Config) -> int:
    if config.engine == "nemo":
        return config.nemo.num_nodes * config.nemo.gpus_per_node
    from mopd_nemo.engines.local.model import resolve_device

    return int(resolve_device(config.model.device).type == "cuda")


def _command(argv: Sequence[str]) -> str | None:
    """The `mopd` command line; None for a program that calls the package."""
    program = Path(argv[0]) if argv else Path()
    ours = program.name == "mopd" or program == Path(mopd_nemo.__file__).with_name("__main__.py")
    return shlex.join(["mopd", *argv[1:]]) if ours else None


def _commit() -> str | None:
    """Commit of the package's own checkout, with `+` if files in it have changed; None without one."""
    root = Path(mopd_nemo.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or it does not trust the owner of the checkout
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
