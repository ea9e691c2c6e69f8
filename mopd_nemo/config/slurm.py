"""Settings of the Slurm job that a run is: the `cluster` block of the config."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from mopd_nemo.config.base import ConfigBlock, Duration


class ClusterConfig(ConfigBlock):
    """The Slurm job, for `mopd submit`. Nodes and GPUs are those of `nemo`.

    Account, partition, image and paths depend on the cluster, not on the experiment; they are in the site file
    (`slurm/site.example.yaml`).
    """

    time_limit: Duration = "4:00:00"
    """Wall-clock limit of one attempt, `hours:minutes:seconds` or `days-hours:minutes:seconds`."""
    stop_minutes: PositiveInt = 15
    """Minutes before the limit at which the run is told to finish its step and save. A step, an evaluation and a
    checkpoint must fit into them."""
    max_restarts: NonNegativeInt = 20
    """Maximum number of automatic requeues after a time limit. 0: never requeue."""
    start_minutes: PositiveInt = 30
    """Minutes that a node has to join, including the time to fetch a container image. After that the job ends."""
    silent_seconds: Annotated[int, Field(ge=6)] = 30
    """Seconds without a sign of life from a node after which the job ends. A node that does not see the log directory
    by then ends it, too."""
    port: PositiveInt = 1200
    """First port of Ray, which takes port to port + 7 and port + 800 to port + 1799. Avoid NeMo-RL's ports (3000 to
    8999) and the nodes' ephemeral range."""
