"""Which GPUs should generate: for each config the step with all GPUs taking turns, and the best split of them.

A table of bench/scale.py (`--splits`), by its arithmetic; nothing is measured. With GPUs of their own, generation and
learning follow each other at `rollout.lag: 0`. At `rollout.lag: 1` the longer of them decides, and only the refit,
which needs both, comes on top. vLLM then takes 90 % of its GPUs, and nobody hands memory over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.cost import cache_room
from bench.scale import Assumptions, Setting, seconds
from mopd_nemo.config.cluster import training_gpus
from mopd_nemo.engines.nemo.memory import RESERVE_GB, estimate

SHARE = 0.9
"""Of the memory of a GPU that only generates, for vLLM's weights and caches."""


@dataclass(frozen=True, slots=True)
class Split:
    """GPUs of a config that generate and that learn, and the seconds of a step's two sides."""

    generating: int
    """0: all GPUs do both, in turns."""
    learning: int
    drawing: float
    rest: float
    """Refit not counted."""
    refit: float

    def step(self, lag: int) -> float:
        """Seconds of a step."""
        if lag and not self.generating:
            raise ValueError("a lag needs GPUs that only generate")
        return self.refit + (max(self.drawing, self.rest) if lag else self.drawing + self.rest)


def splits(setting: Setting, assumed: Assumptions) -> Iterator[Split]:
    """The config with all GPUs in turns, then every split into whole engines and whole copies that have room."""
    nemo = setting.config.nemo
    unit = nemo.gpus_per_node if nemo.num_nodes > 1 else 1
    free = setting.gpus - nemo.teacher_gpus
    for generating in range(0, free, unit):
        learning = free - generating
        if generating % nemo.generation.tensor or learning % nemo.student.model_gpus:
            continue
        changed = _with(setting, generating)
        if not generating or _has_room(changed, assumed):
            yield _split(changed, assumed)


def best(setting: Setting, assumed: Assumptions, lag: int) -> Split | None:
    """The fastest split with GPUs that only generate. None: no split has room."""
    apart = [split for split in splits(setting, assumed) if split.generating]
    return min(apart, key=lambda split: split.step(lag), default=None)


def rows(settings: list[Setting], assumed: Assumptions) -> Iterator[list[str]]:
    """Name, step in turns, best split and step at lag 0 and 1, and how much the last saves."""
    for setting in settings:
        if setting.config.method == "gkd":  # its responses are on disk
            continue
        turns = next(splits(setting, assumed)).step(0)
        row = [setting.name, f"{turns:.1f}"]
        for lag in (0, 1):
            split = best(setting, assumed, lag)
            row += ["-", "-"] if split is None else [f"{split.generating} + {split.learning}", f"{split.step(lag):.1f}"]
        ahead = best(setting, assumed, 1)
        yield [*row, "-" if ahead is None else f"{1 - ahead.step(1) / turns:+.0%}"]


HEADER = ["config", "in turns s", "best lag 0", "s", "best lag 1", "s", "saved"]


def _with(setting: Setting, generating: int) -> Setting:
    nemo = setting.config.nemo
    share = SHARE if generating else nemo.generation.gpu_memory_utilization
    generation = nemo.generation.model_copy(update={"gpus": generating, "gpu_memory_utilization": share})
    changed = nemo.model_copy(update={"generation": generation})
    return replace(setting, config=setting.config.model_copy(update={"nemo": changed}))


def _has_room(setting: Setting, assumed: Assumptions) -> bool:
    """By the launcher's own estimate; caches for all sequences at once are not asked for."""
    gpu_gb = assumed.machine.memory / 1e9
    need = estimate(setting.config, setting.student, setting.teacher, gpu_gb)
    return max(need["update"], need["score"]) <= gpu_gb - RESERVE_GB / 2


def _split(setting: Setting, assumed: Assumptions) -> Split:
    found, generation = seconds(setting, assumed), setting.config.nemo.generation
    rollout, lengths = setting.config.rollout, setting.lengths
    generating = generation.gpus or training_gpus(setting.config.nemo)
    room = cache_room(
        setting.student,
        assumed.machine,
        rollout.num_prompts_per_step * rollout.num_rollouts_per_prompt,
        lengths.prompt + lengths.response,
        generating,
        generation.tensor,
        generation.gpu_memory_utilization,
    )
    drawing = found["prefill"] + found["decode"] * max(1.0, 1 / room if room > 0 else float("inf"))
    refit = found["refit"]
    rest = sum(found.values()) - found["prefill"] - found["decode"] - refit
    return Split(generation.gpus, training_gpus(setting.config.nemo), drawing, rest, refit)
