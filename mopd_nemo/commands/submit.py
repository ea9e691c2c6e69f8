"""`mopd submit`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.slurm.checks import memory_line, problems_of
from mopd_nemo.slurm.job import Job, Task, describe, parse_seeds, render
from mopd_nemo.slurm.site import SiteConfig, load_site
from mopd_nemo.slurm.submit import remove_job, sbatch, write_job


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line of `mopd submit`."""

    nodes: int | None
    site: Path | None
    output: Path | None
    seeds: str | None
    chain: int
    after: str | None
    task: Task
    dry_run: bool


def run_submit(config_file: Path, overrides: Sequence[str], options: Options) -> None:
    """Check, write and submit the job; with `dry_run` print its script and what would be refused.

    Raises:
        UserError: the config, the site file or the command line is wrong, the job could not run, or Slurm refuses it.
    """
    job = _job(config_file, overrides, options)
    problems = problems_of(job)
    memory = memory_line(job.config, job.site)
    described = [*describe(job), *([memory] if memory else [])]
    if options.dry_run:
        print(render(job), end="", flush=True)
        for line in (*described, *(f"would be refused: {problem}" for problem in problems)):
            print(line, file=sys.stderr)
        return
    if problems:
        raise UserError("\n".join(problems))
    write_job(job)
    for line in described:
        print(line)
    _submit_chain(job, options)
    logs = job.logs / ("latest-SEED" if job.seeds else "latest")
    print(f"follow   tail -F {logs}/driver.log")
    print(f"attach   {logs}/attach.sh")
    print(f"stop     touch {logs}/stop   # saves first; scancel ends it at once")


def _submit_chain(job: Job, options: Options) -> None:
    after = options.after
    for number in range(options.chain):
        try:
            submitted = sbatch(job.script, _dependency(after))
        except UserError:
            if number == 0:  # no job will need the directory
                remove_job(job)
            raise
        print(f"job {submitted}{f' after {after}' if after else ''}: {job.script}")
        after = submitted


def _job(config_file: Path, overrides: Sequence[str], options: Options) -> Job:
    if options.chain < 1:
        raise UserError(f"--chain {options.chain}: at least one job")
    implied = [f"nemo.num_nodes={options.nodes}"] if options.nodes is not None else []
    if options.chain > 1:
        implied.append("cluster.max_restarts=0")  # the next job of the chain goes on, not this one again
    config = load_config(config_file, [*overrides, *implied])
    site = _site(options)
    started = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    directory = options.output or (Path(config.run_dir) if config.run_dir else Path(site.root) / started)
    return Job(
        config=config.model_copy(update={"run_dir": None}),
        site=site,
        directory=directory.expanduser().absolute(),
        workdir=Path.cwd(),
        task=options.task,
        seeds=parse_seeds(options.seeds),
    )


def _site(options: Options) -> SiteConfig:
    try:
        return load_site(options.site)
    except UserError as error:
        if not options.dry_run or options.site is not None:
            raise
        print(f"{error}\nhere is the script without one", file=sys.stderr)
        return SiteConfig(root=str(Path("runs").absolute()))


def _dependency(after: str | None) -> list[str]:
    """A job that cannot start any more, because the one before it has failed, does not stay in the queue."""
    return [f"--dependency=afterok:{after.replace(',', ':')}", "--kill-on-invalid-dep=yes"] if after else []
