"""What can be known to be wrong before a job waits in a queue: paths, models, secrets, memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mopd_nemo.config import Config
from mopd_nemo.slurm.architecture import KNOWN, architecture_of, find_model
from mopd_nemo.slurm.job import Job
from mopd_nemo.slurm.memory import Estimate, check_divisible, estimate, generation_weights
from mopd_nemo.slurm.site import SiteConfig


def problems_of(job: Job) -> list[str]:
    """Everything that would make the job fail, each with its remedy; empty when nothing was found."""
    return [
        *memory_problems(job.config, job.site),
        *_paths(job),
        *_models(job),
        *_secrets(job.site),
    ]


def memory_line(config: Config, site: SiteConfig) -> str | None:
    """The estimate for a person to read, where the sizes of the models are known."""
    student = architecture_of(config.model.path, site.hf_home)
    if config.engine != "nemo" or student is None:
        return None
    path = config.teacher.path
    teacher = architecture_of(path, site.hf_home) if path else None
    needed = estimate(config, student, teacher, site.gpu_memory_gb)
    return (
        f"estimated GB on a GPU of {site.gpu_memory_gb}: train {needed.train:.0f}, score {needed.score:.0f}, "
        f"generate {needed.generate:.0f}"
    )


def memory_problems(config: Config, site: SiteConfig) -> list[str]:
    """What does not fit into a GPU or cannot be cut as configured. Models of unknown sizes are passed over."""
    student = architecture_of(config.model.path, site.hf_home)
    if config.engine != "nemo" or student is None:
        return []
    path = config.teacher.path if config.teacher.kind == "external" else None
    teacher = architecture_of(path, site.hf_home) if path else None
    found = [check_divisible("student", student, config.nemo.student)]
    if teacher is not None:
        found.append(check_divisible("teacher", teacher, config.nemo.teacher))
        if teacher.vocab != student.vocab:
            found.append(
                f"teacher.path={path} has a vocabulary of {teacher.vocab}, model.path={config.model.path} one of "
                f"{student.vocab}: a teacher must have the student's"
            )
    if not any(found):
        found += _too_much(estimate(config, student, teacher, site.gpu_memory_gb), site.gpu_memory_gb)
        share = config.nemo.generation.gpu_memory_utilization * site.gpu_memory_gb
        if (weights := generation_weights(config, student)) > 0.8 * share:
            found.append(
                f"nemo.generation.tensor={config.nemo.generation.tensor}: {weights:.0f} GB of weights a GPU leave vLLM "
                f"too little of its {share:.0f} GB for responses: raise it, or nemo.generation.gpu_memory_utilization"
            )
    return [problem for problem in found if problem]


def _too_much(needed: Estimate, gpu_gb: int) -> list[str]:
    remedies = {
        "train": "raise nemo.student.tensor, pipeline or nemo.num_nodes, or lower train.tokens_per_micro_batch",
        "score": "raise tensor of nemo.student (of nemo.teacher, when it is external), or set nemo.offload_optimizer",
        "generate": "lower nemo.generation.gpu_memory_utilization",
    }
    return [
        f"{phase} needs about {gb:.0f} GB a GPU, more than the {gpu_gb} GB there are (gpu_memory_gb): {remedy}"
        for phase, remedy in remedies.items()
        if (gb := getattr(needed, phase)) > gpu_gb
    ]


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
    """Why nothing can be written at a place that need not exist yet."""
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
