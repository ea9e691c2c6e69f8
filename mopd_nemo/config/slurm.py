"""Settings of the Slurm job that a run is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from mopd_nemo.config.base import Section

if TYPE_CHECKING:
    from mopd_nemo.config import Config

_TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2}):(\d{2})")


class ClusterConfig(Section):
    """The Slurm job, for `mopd submit`. Its nodes and GPUs are those of `nemo`; what depends on the cluster and not on
    the experiment (account, partition, image, paths) is in the site file, see `slurm/site.example.yaml`."""

    time_limit: str = "4:00:00"
    """Wall-clock limit of one attempt, `hours:minutes:seconds` or `days-hours:minutes:seconds`."""
    stop_minutes: PositiveInt = 15
    """So long before the limit the run is told to end its step and save. A step, an evaluation and a checkpoint must
    fit into it."""
    max_restarts: NonNegativeInt = 20
    """A job that has saved at its limit is queued again, so many times at most. 0: never."""
    start_minutes: PositiveInt = 30
    """A node that has not joined by then ends the job. Fetching a container image counts."""
    silent_seconds: Annotated[int, Field(ge=6)] = 30
    """A node that has shown no sign of life for so long ends the job, and so does one that does not see the log
    directory by then."""
    port: PositiveInt = 1200
    """First port of Ray; it takes port to port + 7, and port + 800 to port + 1799. Keep clear of NeMo-RL's 3000 to 8999
    and of the nodes' ephemeral range."""


def seconds_of(time_limit: str) -> int:
    """A Slurm time limit in seconds.

    Raises:
        ValueError: it has another form.
    """
    match = _TIME.fullmatch(time_limit)
    if match is None:
        raise ValueError(f"cluster.time_limit={time_limit!r}: write it as 4:00:00 or 1-12:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def check_cluster(config: Config) -> None:
    """Refuse settings that cannot work together.

    Raises:
        ValueError: naming the keys, their values and the remedy.
    """
    cluster = config.cluster
    if cluster.stop_minutes * 60 >= seconds_of(cluster.time_limit):
        raise ValueError(
            f"cluster.stop_minutes={cluster.stop_minutes} leaves nothing of cluster.time_limit={cluster.time_limit}: "
            "lower the first or raise the second"
        )
    last = cluster.port + 1799
    if cluster.port < 1024 or last > 65535:
        raise ValueError(f"cluster.port={cluster.port}: Ray would take ports up to {last}; choose 1024 to 63736")
