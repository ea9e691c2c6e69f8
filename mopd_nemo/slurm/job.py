"""A job and its sbatch script. Pure functions: they read no file and ask no cluster."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.base import seconds_of
from mopd_nemo.slurm.site import SiteConfig

Task = Literal["train", "eval", "interactive"]


@dataclass(frozen=True, slots=True)
class Job:
    """One submission to Slurm."""

    config: Config
    site: SiteConfig
    directory: Path
    """The run directory, or with several seeds the directory of the run directories. Absolute."""
    workdir: Path
    """Working directory of the driver, which relative paths of the config start from. Absolute."""
    task: Task = "train"
    seeds: tuple[int, ...] = ()
    """Seeds of a job array, one run each. Empty: one run with the config's seed."""

    @property
    def nodes(self) -> int:
        """Nodes of the allocation."""
        return self.config.nemo.num_nodes

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each node. The local engine uses one, or none with `model.device=cpu`."""
        if self.config.engine == "nemo":
            return self.config.nemo.gpus_per_node
        return 0 if self.config.model.device == "cpu" else 1

    @property
    def ray(self) -> bool:
        """Whether Ray is started: for NeMo-RL, and to rehearse several nodes with the local engine."""
        return self.config.engine == "nemo" or self.nodes > 1

    @property
    def script(self) -> Path:
        """The sbatch script."""
        return self.directory / "job" / "job.sbatch"

    @property
    def logs(self) -> Path:
        """Logs of all attempts."""
        return self.directory / "job" / "logs"

    @property
    def code(self) -> Path:
        """The copy of this package that the job runs."""
        return self.directory / "job" / "code"


def render(job: Job) -> str:
    """The sbatch script."""
    template = _environment().get_template("job.sbatch.j2")
    exports = {name: shlex.quote(value) for name, value in _exports(job).items()}
    return template.render(
        job=job, directory=shlex.quote(str(job.directory)), directives=_directives(job), exports=exports
    )


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """`0,1,2` as numbers. A seed is also the number of its task in the job array.

    Raises:
        UserError: the text has another form.
    """
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise UserError(f"--seeds {text}: write different whole numbers with commas, for example 0,1,2")
    return tuple(int(part) for part in parts)


def mounts(job: Job) -> list[str]:
    """The container's mounts, in the form of pyxis."""
    own = [job.site.root, str(job.directory), str(job.workdir), *([job.site.hf_home] if job.site.hf_home else [])]
    given = [mount if ":" in mount else f"{mount}:{mount}" for mount in (*job.site.mounts, *job.site.node_mounts)]
    seen = [Path(mount.split(":")[0]) for mount in given if len(set(mount.split(":")[:2])) == 1]
    for path in map(Path, own):
        if not any(path.is_relative_to(outer) for outer in seen):
            seen.append(path)
            given.append(f"{path}:{path}")
    return given


def _directives(job: Job) -> list[str]:
    cluster, site = job.config.cluster, job.site
    named = {
        "account": site.account,
        "partition": site.partition,
        "qos": site.qos,
        "reservation": site.reservation,
        "time": _slurm_time(cluster.time_limit),
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "signal": f"B:USR1@{cluster.stop_minutes * 60}",
        "output": job.logs / ("slurm-%A_%a.out" if job.seeds else "slurm-%j.out"),
        "open-mode": "append",
        "export": "HOME,USER,PATH,LANG",
        "array": ",".join(map(str, job.seeds)) or None,
    }
    flags = ["requeue" if cluster.max_restarts else "no-requeue"]
    if site.exclusive:
        flags += ["exclusive", "mem=0"]
    if job.gpus_per_node and site.gpu_request != "none":
        request = "gpus-per-node=" if site.gpu_request == "gpus-per-node" else "gres=gpu:"
        flags.append(f"{request}{job.gpus_per_node}")
    return [
        f"--job-name={job.config.name}",
        *(f"--{key}={value}" for key, value in named.items() if value is not None),
        *(f"--{flag}" for flag in flags),
        *site.options,
    ]


def _slurm_time(duration: str) -> str:
    """Slurm separates days with a hyphen, NeMo-RL with a colon."""
    return duration.replace(":", "-", 1) if duration.count(":") == 3 else duration


def _exports(job: Job) -> dict[str, str]:
    """Variables for the scripts of the job, and the environment of its processes."""
    cluster, site = job.config.cluster, job.site
    own = {
        "MOPD_TASK": job.task,
        "MOPD_SEED": "" if job.seeds else str(job.config.seed),
        "MOPD_CODE": str(job.code),
        "MOPD_SCRIPTS": str(job.code / "mopd_nemo" / "slurm" / "scripts"),
        "MOPD_WORKDIR": str(job.workdir),
        "MOPD_NODES": str(job.nodes),
        "MOPD_GPUS": str(job.gpus_per_node),
        "MOPD_RAY": "yes" if job.ray else "",
        "MOPD_PORT": str(cluster.port),
        "MOPD_START_SECONDS": str(cluster.start_minutes * 60),
        "MOPD_SILENT_SECONDS": str(cluster.silent_seconds),
        "MOPD_MAX_RESTARTS": str(cluster.max_restarts),
        "MOPD_IMAGE": site.image or "",
        "MOPD_MOUNTS": ",".join(mounts(job)) if site.image else "",
        "MOPD_CONTAINER_ENV": ",".join(_environment_of_processes(job)) if site.image else "",
        "MOPD_SETUP": site.setup.strip(),
        "MOPD_SECRETS": site.secrets or "",
    }
    return {name: value for name, value in own.items() if value} | _environment_of_processes(job)


def _environment_of_processes(job: Job) -> dict[str, str]:
    site = job.site
    variables = {"TOKENIZERS_PARALLELISM": "false"}
    if job.config.engine == "nemo":
        # Megatron refuses to start without the first. The second keeps NeMo-RL's converted models for all runs. With
        # the third, Ray lets NeMo-RL choose the interpreters of its workers.
        variables |= {
            "TORCH_CUDA_ARCH_LIST": "9.0",
            "NRL_MEGATRON_CHECKPOINT_DIR": f"{site.root}/megatron",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "OMP_NUM_THREADS": "8",
        }
    if site.hf_home:
        variables["HF_HOME"] = site.hf_home
    if site.offline:
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if job.config.logging.wandb == "offline":
        variables["WANDB_MODE"] = "offline"
    return variables | site.environment


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mopd_nemo.slurm"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quoted"] = shlex.quote
    return environment


def describe(job: Job) -> Sequence[str]:
    """The job in a few lines, printed when it is submitted."""
    gpus = job.nodes * job.gpus_per_node
    hours = seconds_of(job.config.cluster.time_limit) / 3600
    runs = max(1, len(job.seeds))
    size = f"{job.nodes} node{'s' * (job.nodes > 1)} × {job.gpus_per_node} GPUs"
    return [
        f"{job.config.name}: {job.config.method} on {job.config.model.path}, {size}",
        f"at most {hours:g} h an attempt, {gpus * hours * runs:g} GPU-hours" + (f" for {runs} seeds" * (runs > 1)),
    ]
