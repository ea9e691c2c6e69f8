"""The site file: settings of a cluster and of the account that submits, kept outside git."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from mopd_nemo.config import UserError
from mopd_nemo.config.base import ConfigBlock
from mopd_nemo.config.load import load_section

DEFAULT_FILE = Path("slurm/site.yaml")
EXAMPLE_FILE = Path("slurm/site.example.yaml")

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


class SiteConfig(ConfigBlock):
    """A cluster and an account on it. `slurm/site.example.yaml` is an example with every key."""

    account: str | None = None
    """`sbatch --account`."""
    partition: str | None = None
    """`sbatch --partition`."""
    qos: str | None = None
    """`sbatch --qos`."""
    reservation: str | None = None
    """`sbatch --reservation`."""
    options: tuple[str, ...] = ()
    """Further sbatch options, each as `--name=value`."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """Request for GPUs: `--gpus-per-node=8`, `--gres=gpu:8`, or none where nodes are allocated whole."""
    exclusive: bool = True
    """Ask for whole nodes and all their memory."""
    gpu_memory_gb: PositiveInt = 80
    """Memory of one GPU."""
    root: str = "runs"
    """Directory of the runs, on a file system that every node mounts."""
    image: str | None = None
    """Container image for pyxis: a .sqsh file or `registry#name:tag`. `null`: bare metal."""
    mounts: tuple[str, ...] = ()
    """Directories to mount in the container, as `path` or `path:path_inside`. They must exist where the job is
    submitted. The working directory and the run's directory are added."""
    node_mounts: tuple[str, ...] = ()
    """Directories that exist on the nodes only, such as local disks, in the same form."""
    setup: str = ""
    """Shell lines run on every node first, for bare metal: load modules, activate an environment."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every process of the job. No secrets."""
    secrets: str | None = None
    """File with `NAME=value` lines, readable by you alone: WANDB_API_KEY and the like. Its content never enters a
    script, a command line or a log."""
    hf_home: str | None = None
    """Hugging Face cache (HF_HOME) on the shared file system."""
    offline: bool = True
    """Nodes read models and data sets from `hf_home` only, never from the network."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.environment:
            if _SECRET_NAME.search(name):
                raise ValueError(
                    f"environment.{name} looks like a secret, which would be written into the job script: put it into "
                    "the file that `secrets` names"
                )
        for option in self.options:
            if not option.startswith("--"):
                raise ValueError(f"options: {option!r}: write each as --name=value")
        for mount in (*self.mounts, *self.node_mounts):
            if not mount.startswith("/") or "," in mount:
                raise ValueError(f"mounts: {mount!r}: write an absolute path, or path:path_inside, without commas")
        return self


def load_site(file: Path | None) -> SiteConfig:
    """Read the given site file, else that of $MOPD_SITE, else `slurm/site.yaml`.

    Raises:
        UserError: there is no such file, or a value is wrong.
    """
    chosen = file or Path(os.environ.get("MOPD_SITE") or DEFAULT_FILE)
    if not chosen.is_file():
        raise UserError(
            f"{chosen}: no such site file; copy {EXAMPLE_FILE} there and write down your account and partition, or "
            "name another with --site or MOPD_SITE"
        )
    site = load_section(SiteConfig, chosen)
    places = {key: value for key in ("root", "hf_home", "secrets") if (value := getattr(site, key)) is not None}
    return site.model_copy(update={key: str(Path(place).expanduser().absolute()) for key, place in places.items()})
