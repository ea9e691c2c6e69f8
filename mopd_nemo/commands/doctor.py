"""`mopd doctor`: which parts are installed and usable on this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass

from rich.table import Table

from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import CodeConfig
from mopd_nemo.engines.nemo import has_nemo_rl
from mopd_nemo.terminal import Terminal, plain
from mopd_nemo.verifiers.sandbox.layers import choose


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's table."""

    part: str
    usable: bool
    found: str
    needed_for: str


def doctor() -> None:
    """Show which parts are installed and usable on this machine."""
    table = Table(box=None)
    for name in ("", "part", "found", "needed for"):
        table.add_column(name, overflow="fold")
    for finding in findings():
        mark = plain("yes", "green") if finding.usable else plain("no", "yellow")
        table.add_row(mark, finding.part, finding.found, plain(finding.needed_for, "dim"))
    Terminal().print(table)


def findings() -> list[Finding]:
    """Look at every part. Of the slow imports only torch is made."""
    everything = "everything"
    cluster = "engine=nemo on a cluster"
    return [
        Finding("python", True, f"{platform.python_version()}, {os.cpu_count()} cores", everything),
        _package("torch", everything),
        _gpu(),
        _package("transformers", everything),
        _package("ray", cluster),
        _nemo_rl(cluster),
        _package("megatron-core", cluster, module="megatron.core"),
        _package("transformer-engine", cluster, module="transformer_engine"),
        _package("apex", "fused Megatron optimisers, where the container has it"),
        _package("vllm", "fast generation"),
        _package("tensorboard", "logging.tensorboard=true"),
        _package("wandb", "logging.wandb=online or offline"),
        _program("Slurm", "sbatch", ["sbatch", "--version"], "submitting jobs"),
        _sandbox(),
    ]


def _package(name: str, needed_for: str, module: str | None = None) -> Finding:
    try:
        spec = importlib.util.find_spec(module or name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        return Finding(name, False, "not installed", needed_for)
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = f"from {spec.origin}"
    return Finding(name, True, found, needed_for)


def _gpu() -> Finding:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = ", ".join(names) or "none that torch can use; everything runs on the CPU"
    return Finding("GPU", bool(names), found, "models beyond a few million parameters")


def _nemo_rl(needed_for: str) -> Finding:
    if not has_nemo_rl():
        return Finding("nemo_rl", False, "not importable; put a NeMo-RL checkout on PYTHONPATH", needed_for)
    spec = importlib.util.find_spec("nemo_rl")
    return Finding("nemo_rl", True, f"from {spec.origin if spec else None}", needed_for)


def _program(part: str, program: str, version: list[str], needed_for: str) -> Finding:
    if shutil.which(program) is None:
        return Finding(part, False, f"{program} is not on PATH", needed_for)
    answer = subprocess.run(version, capture_output=True, text=True, timeout=10, check=False)
    first = next(iter((answer.stdout or answer.stderr).strip().splitlines()), "no answer")
    return Finding(part, answer.returncode == 0, first, needed_for)


def _sandbox() -> Finding:
    """The layer that `verifier.code.sandbox=auto` chooses here, and why no better one."""
    needed_for = "running model-written code (task code)"
    try:
        choice = choose(CodeConfig())
    except UserError as error:
        return Finding("sandbox", False, str(error), needed_for)
    return Finding("sandbox", True, str(choice), needed_for)
