"""How much memory a run needs on its fullest device, by phase and part, before anything is loaded.

One estimate for dry runs, preflight, jobs and `mopd estimate`; each engine has its own arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from mopd_nemo.config import Config
from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.engines.architecture import Architecture, architecture_of

Parts = dict[str, float]
"""GB (10^9 bytes) by what takes them."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Peak memory of the phases of a step."""

    phases: dict[str, Parts]
    """In the order of a step. A phase that does not take place has no parts."""

    def __getitem__(self, phase: str) -> float:
        """GB of a phase."""
        return sum(self.phases[phase].values())

    @property
    def fullest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.__getitem__)

    @property
    def peak(self) -> float:
        """GB of the fullest phase."""
        return self[self.fullest]


def estimate(config: Config, device: str, device_gb: float, hf_home: str | None = None) -> Estimate | None:
    """The peak memory of a config. None: the sizes of a model are unknown.

    Args:
        device: `cuda` or `cpu`; `engine: nemo` is on GPUs.
        device_gb: memory of the device, of which vLLM takes a share.
        hf_home: where models of the hub may lie.
    """
    paths = [config.model.path, *(t.path for t in config.every_teacher.values() if t.path)]
    found = [sizes_of(path, hf_home) for path in paths]
    known = [sizes for sizes in found if sizes is not None]
    if len(known) < len(paths):
        return None
    student, *teachers = known
    if config.engine == "nemo":
        from mopd_nemo.engines.nemo.memory import estimate as of_cluster

        return of_cluster(config, student, teachers[0] if teachers else None, device_gb)
    from mopd_nemo.engines.local.memory import estimate as of_one_device

    return of_one_device(config, student, teachers, device, device_gb)


def sizes_of(path: str, hf_home: str | None = None) -> Architecture | None:
    """The sizes of a model as a config names it. None: it is not here, or of another family.

    Raises:
        UserError: there is no such embedded model.
    """
    return architecture_of(resolve_model_path(path), hf_home)


def shortage(need: Estimate, device_gb: float) -> list[str]:
    """The phases that need more than the device has, each with its largest parts."""
    found = []
    for phase, parts in need.phases.items():
        if need[phase] > device_gb:
            largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
            most = ", ".join(f"{name} {gb:.3g}" for name, gb in largest)
            found.append(f"{phase} may need {need[phase]:.3g} GB of {device_gb:.3g} GB (most: {most})")
    return found
