"""`mopd submit`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from mopd_nemo.commands import ConfigFile, Overrides
from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.slurm.job import Job, Task, describe, parse_seeds, render
from mopd_nemo.slurm.site import SiteConfig, load_site
from mopd_nemo.slurm.submit import memory_lines, problems_of, remove_job, sbatch, write_job


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes; short for nemo.num_nodes=N.")] = None,
    site: Annotated[
        Path | None, typer.Option(help="Site file. Default: $MOPD_SITE, else slurm/site.yaml.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory. Default: NAME-DATE-TIME in the site's root.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Several runs as a job array, for example 0,1,2.")] = None,
    chain: Annotated[int, typer.Option(min=1, help="Number of jobs, each continuing where the last one saved.")] = 1,
    after: Annotated[
        str | None, typer.Option(help="Start when these jobs have succeeded, for example 123,124.")
    ] = None,
    task: Annotated[
        Task, typer.Option(help="`eval` evaluates model.path; `interactive` starts Ray and waits.")
    ] = "train",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the script; write and submit nothing. Exit code 2: it would be refused."),
    ] = False,
) -> None:
    """Submit a run to Slurm: Ray on all nodes, one driver, saved and queued again at the time limit.

    mopd submit --config configs/quickstart.yaml --dry-run

    mopd submit --config configs/paper/mopd-qwen3-8b-chemistry-1n8g-tp2.yaml --seeds 0,1,2
    """
    implied = [] if nodes is None else [f"nemo.num_nodes={nodes}"]
    if chain > 1:
        implied.append("cluster.max_restarts=0")  # the next job of the chain continues, not this one again
    settings = load_config(config, [*(overrides or []), *implied])
    site_config = _site(site, dry_run)
    job = Job(
        config=settings.model_copy(update={"run_dir": None}),
        site=site_config,
        directory=_directory(settings, site_config, output),
        workdir=Path.cwd(),
        task=task,
        seeds=parse_seeds(seeds),
    )
    problems = problems_of(job)
    described = [*describe(job), *memory_lines(job.config, job.site)]
    if dry_run:
        print(render(job), end="", flush=True)
        for line in (*described, *(f"would be refused: {problem}" for problem in problems)):
            print(line, file=sys.stderr)
        if problems:
            raise typer.Exit(2)
        return
    if problems:
        raise UserError("\n".join(problems))
    made = write_job(job)
    for line in described:
        print(line)
    _submit_chain(job, chain, after, made)
    logs = job.logs / ("latest-SEED" if job.seeds else "latest")
    print(f"follow   tail -F {logs}/driver.log")
    print(f"attach   {logs}/attach.sh")
    print(f"stop     touch {logs}/stop   # saves first; scancel ends it at once")


def _site(file: Path | None, dry_run: bool) -> SiteConfig:
    try:
        return load_site(file)
    except UserError as error:
        if not dry_run or file is not None:
            raise
        print(f"{error}\nhere is the script without one", file=sys.stderr)
        return SiteConfig(root=str(Path("runs").absolute()))


def _directory(config: Config, site: SiteConfig, output: Path | None) -> Path:
    started = f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    directory = output or (Path(config.run_dir) if config.run_dir else Path(site.root) / started)
    return directory.expanduser().absolute()


def _submit_chain(job: Job, length: int, after: str | None, made: Sequence[Path]) -> None:
    for number in range(length):
        try:
            submitted = sbatch(job.script, _dependency(after))
        except UserError:
            if number == 0:  # no job will need the directory
                remove_job(job, made)
            raise
        print(f"job {submitted}{f' after {after}' if after else ''}: {job.script}")
        after = submitted


def _dependency(after: str | None) -> list[str]:
    """Options for a job after another one. If that one fails, Slurm removes this one from the queue."""
    return [f"--dependency=afterok:{after.replace(',', ':')}", "--kill-on-invalid-dep=yes"] if after else []
