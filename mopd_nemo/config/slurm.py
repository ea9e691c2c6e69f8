"""Settings of the Slurm job that a run is: the `cluster` block of the config."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from mopd_nemo.config.base import ConfigBlock, Duration


class ClusterConfig(ConfigBlock):
    """The Slurm job, for `mopd submit`. Its nodes and GPUs are those of `nemo`; what depends on the cluster and not on
    the experiment (account, partition, image, paths) is in the site file, see `slurm/site.example.yaml`."""

    time_limit: Duration = "4:00:00"
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
