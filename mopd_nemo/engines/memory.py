"""What an estimate of a run's memory says; `engines.estimate_memory` makes it, each engine by its own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

Parts = dict[str, float]
"""GB (10^9 bytes) by what takes them."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Peak memory of the phases of a step."""

    phases: dict[str, Parts]
    """In the order of a step. A phase that does not take place has no parts."""
    host: float = 0.0
    """GB of host memory for what is offloaded, at least. 0 where it is the device's own: then it is a part."""

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


def shortage(need: Estimate, device_gb: float) -> list[str]:
    """The phases that need more than the device has, each with its largest parts."""
    found = []
    for phase, parts in need.phases.items():
        if need[phase] > device_gb:
            largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
            most = ", ".join(f"{name} {gb:.3g}" for name, gb in largest)
            found.append(f"{phase} may need {need[phase]:.3g} GB of {device_gb:.3g} GB (most: {most})")
    return found
