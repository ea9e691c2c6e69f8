"""Write a job's directory and hand it to Slurm."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import mopd_nemo
from mopd_nemo.config import UserError
from mopd_nemo.config.load import dump_config
from mopd_nemo.slurm.job import Job, render


def write_job(job: Job) -> None:
    """The script, the settings, and a copy of this package: a queued job does not change with the checkout.

    Raises:
        UserError: the directory holds a job already, or cannot be written.
    """
    if job.script.exists():
        raise UserError(
            f"{job.directory}: holds a job already; `sbatch {job.script}` continues it, or choose another --output"
        )
    try:
        job.logs.mkdir(parents=True, exist_ok=True)
        package = Path(mopd_nemo.__file__).parent
        shutil.copytree(
            package, job.code / package.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
        job.script.with_name("config.yaml").write_text(dump_config(job.config))
        job.script.write_text(render(job))
    except OSError as error:
        raise UserError(
            f"{job.directory}: cannot write there: {error.strerror}; change root in the site file, or --output"
        ) from error


def remove_job(job: Job) -> None:
    """Undo `write_job`."""
    shutil.rmtree(job.script.parent)
    if not any(job.directory.iterdir()):
        job.directory.rmdir()


def sbatch(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a script.

    Args:
        options: added to those in the script, for what is no part of the job itself, such as dependencies.

    Returns:
        The job's id.

    Raises:
        UserError: there is no Slurm here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH: submit from a login node of the cluster; --dry-run needs no Slurm")
    answer = subprocess.run(
        ["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True, check=False
    )
    if answer.returncode:
        raise UserError(f"Slurm refuses {script}: {_reason(answer.stderr)}")
    return answer.stdout.strip().split(";")[0]


_REMEDIES = {
    r"account": "account in the site file; yours are listed by: sacctmgr show associations user=$USER format=account",
    r"partition": "partition in the site file; there are: {partitions}",
    r"qos": "qos in the site file",
    r"reservation": "reservation in the site file; see: scontrol show reservation",
    r"time limit": "cluster.time_limit; the partitions' limits are listed by: sinfo -o '%P %l'",
    r"node configuration|node count|gres|gpu": "nemo.num_nodes, nemo.gpus_per_node, and gpu_request in the site file",
    r"dependency": "--after",
}


def _reason(message: str) -> str:
    lines = [re.sub(r"^sbatch: (error: )?", "", line) for line in message.strip().splitlines()]
    text = " ".join(dict.fromkeys(lines)).strip()
    for pattern, remedy in _REMEDIES.items():
        if re.search(pattern, text, re.IGNORECASE):
            return f"{text}. Check {remedy.format(partitions=_partitions())}"
    return text


def _partitions() -> str:
    answer = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=False)
    return ", ".join(dict.fromkeys(answer.stdout.split())) or "none that sinfo shows"
