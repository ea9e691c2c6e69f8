"""Find reasons why a job would fail before it waits in a queue, write its directory, and submit it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import mopd_nemo
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import dump_config
from mopd_nemo.engines.architecture import KNOWN, Architecture, architecture_of, find_model
from mopd_nemo.engines.nemo.memory import check_divisible, estimate, generation_weights
from mopd_nemo.slurm.job import Job, render
from mopd_nemo.slurm.site import SiteConfig


def problems_of(job: Job) -> list[str]:
    """Every reason why the job would fail, each with its remedy."""
    return [
        *model_problems(job.config, job.site),
        *_paths(job),
        *_models(job),
        *_secrets(job.site),
    ]


def memory_lines(config: Config, site: SiteConfig) -> list[str]:
    """The estimate of GPU memory, with a warning and a remedy where it exceeds a GPU. Empty: the sizes are unknown."""
    student, teacher = _architectures(config, site)
    if student is None:
        return []
    gpu_gb = site.gpu_memory_gb
    needed = estimate(config, student, teacher, gpu_gb)
    lines = [
        f"estimated GB on a GPU of {gpu_gb}: " + ", ".join(f"{phase} {needed[phase]:.0f}" for phase in needed.phases)
    ]
    lines += [
        f"{phase} may need {gb:.0f} GB a GPU, more than the {gpu_gb} GB there are (gpu_memory_gb): {remedy}"
        for phase, remedy in _MEMORY_REMEDIES.items()
        if (gb := needed[phase]) > gpu_gb
    ]
    share = config.nemo.generation.gpu_memory_utilization * gpu_gb
    if (weights := generation_weights(config, student)) > 0.8 * share:
        lines.append(
            f"nemo.generation.tensor={config.nemo.generation.tensor}: {weights:.0f} GB of weights a GPU leave vLLM "
            f"little of its {share:.0f} GB for responses: raise it, or nemo.generation.gpu_memory_utilization"
        )
    return lines


_MEMORY_REMEDIES = {
    "update": "raise nemo.student.tensor, pipeline or nemo.num_nodes, or lower train.tokens_per_micro_batch",
    "score": "raise tensor of nemo.student (of nemo.teacher, when it is external), or set nemo.offload_optimizer",
    "generate": "lower nemo.generation.gpu_memory_utilization",
}


def model_problems(config: Config, site: SiteConfig) -> list[str]:
    """Models that cannot be sharded as configured, or have different vocabularies. Skips models of unknown sizes."""
    student, teacher = _architectures(config, site)
    if student is None:
        return []
    problems = [check_divisible("student", student, config.nemo.student)]
    if teacher is not None:
        problems.append(check_divisible("teacher", teacher, config.nemo.teacher))
        if teacher.vocab != student.vocab:
            problems.append(
                f"teacher.path={config.teacher.path} has a vocabulary of {teacher.vocab}, "
                f"model.path={config.model.path} one of {student.vocab}: a teacher must have the student's"
            )
    return [problem for problem in problems if problem]


def _architectures(config: Config, site: SiteConfig) -> tuple[Architecture | None, Architecture | None]:
    """Sizes of the student and of an external teacher on NeMo-RL. None: unknown, or another engine."""
    if config.engine != "nemo":
        return None, None
    path = config.teacher.path
    teacher = architecture_of(path, site.hf_home) if path else None
    return architecture_of(config.model.path, site.hf_home), teacher


def _paths(job: Job) -> Iterator[str]:
    for mount in job.site.mounts:
        if not Path(mount.split(":")[0]).exists():
            yield f"mounts: {mount}: no such directory here; correct the site file, or list it under node_mounts"
    image = job.site.image
    if image and (image.startswith("/") or image.endswith(".sqsh")) and not Path(image).is_file():
        yield f"image: {image}: no such file; `enroot import` makes it, see docs/cluster.md"
    if problem := unwritable(job.directory):
        yield problem
    for key, source in (("data.train", job.config.data.train), ("data.eval", job.config.data.eval)):
        if source != "arithmetic" and not (job.workdir / source).is_file():
            yield f"{key}={source}: no such file in {job.workdir}; `mopd data list` names the sources that make it"


def unwritable(directory: Path) -> str | None:
    """Why a directory cannot be written, whether it exists or not. None: it can."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        return f"{directory}: {existing} is no directory; change root in the site file, or --output"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{directory}: cannot write in {existing}; change root in the site file, or --output"
    return None


def _models(job: Job) -> Iterator[str]:
    teacher = job.config.teacher
    for key, path in (("model.path", job.config.model.path), ("teacher.path", teacher.path)):
        if path is None or path.startswith("embedded:") or find_model(path, job.site.hf_home) or not job.site.offline:
            continue
        where = f"in hf_home={job.site.hf_home}" if job.site.hf_home else "here, and the site file names no hf_home"
        fetch = (
            f"; fetch it first: HF_HOME={job.site.hf_home or 'DIR'} hf download {path}" if _is_hub_name(path) else ""
        )
        yield f"{key}={path}: no such model {where}{fetch}"


def _is_hub_name(path: str) -> bool:
    return path in KNOWN or (path.count("/") == 1 and not path.startswith((".", "/", "~")))


def _secrets(site: SiteConfig) -> Iterator[str]:
    if site.secrets is None:
        return
    file = Path(site.secrets)
    if not file.is_file():
        yield f"secrets: {file}: no such file"
        return
    if file.stat().st_mode & 0o077:
        yield f"secrets: {file}: others can read it; chmod 600 {file}"
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        name = line.partition("=")[0].removeprefix("export ").strip()
        if line.strip() and not line.startswith("#") and ("=" not in line or not name.isidentifier()):
            yield f"secrets: {file}, line {number}: not of the form NAME=value"


def write_job(job: Job) -> list[Path]:
    """Write the script, the settings and a copy of this package: edits to the checkout do not reach a queued job.

    Returns:
        the directories down to the job's that were not there before, innermost first.

    Raises:
        UserError: the directory holds a job already, or cannot be written.
    """
    if job.script.exists():
        raise UserError(
            f"{job.directory}: holds a job already; `sbatch {job.script}` continues it, or choose another --output"
        )
    made = [path for path in (job.directory, *job.directory.parents) if not path.exists()]
    try:
        job.logs.mkdir(parents=True, exist_ok=True)
        package = Path(mopd_nemo.__file__).parent
        shutil.copytree(
            package, job.code / package.name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
        )
        job.script.with_name("config.yaml").write_text(dump_config(job.config))
        job.script.write_text(render(job))
    except OSError as error:
        remove_job(job, made)
        raise UserError(
            f"{job.directory}: cannot write there: {error.strerror or error}; change root in the site file, or --output"
        ) from error
    return made


def remove_job(job: Job, made: Sequence[Path]) -> None:
    """Undo `write_job`.

    Args:
        made: what it has returned.
    """
    shutil.rmtree(job.script.parent, ignore_errors=True)
    with suppress(OSError):  # no longer empty
        for path in made:
            path.rmdir()


def sbatch(script: Path, options: Sequence[str] = ()) -> str:
    """Submit a script.

    Args:
        options: in addition to those in the script, for example dependencies on other jobs.

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


_SLURM_REMEDIES = {
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
    for pattern, remedy in _SLURM_REMEDIES.items():
        if re.search(pattern, text, re.IGNORECASE):
            return f"{text}. Check {remedy.format(partitions=_partitions())}"
    return text


def _partitions() -> str:
    answer = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=False)
    return ", ".join(dict.fromkeys(answer.stdout.split())) or "none that sinfo shows"
