"""The teacher of the local engine: which model it is, how it follows the student, what it says of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, TeacherConfig
from mopd_nemo.config.teacher import key_of
from mopd_nemo.engines.base import Progress
from mopd_nemo.engines.local.model import DTYPES, LanguageModel, load_model
from mopd_nemo.engines.local.offload import OffloadedModel, on_host
from mopd_nemo.engines.local.targets import Target, read_by_model, read_by_server
from mopd_nemo.engines.served import ServedTeacher
from mopd_nemo.types import TrainExample


class Teacher:
    """The model whose distribution the student follows; `model` is None without one in this process.

    `live` shares the student's weights, so it moves with every update. `ema` is a float32 copy of those that are
    trained. `frozen` and `external` never move and are loaded from their model directory, so a checkpoint needs only
    the weights of `ema`. Weights that are not trained, below adapters, are the student's own in all but `external`. Of
    `server`, there is nothing here but its address.
    """

    def __init__(self, student: LanguageModel, chat: Chat, config: Config, name: str) -> None:
        self._config: TeacherConfig = config.every_teacher[name]
        self._device = student.device
        self.model = self._make(student, config, f"{key_of(name)}.path")
        self.served: ServedTeacher | None = None
        if self._config.kind == "server":
            self.served = ServedTeacher(config, name, chat, student.head.weight.shape[0])

    def _make(self, student: LanguageModel, config: Config, key: str) -> LanguageModel | None:
        match self._config.kind:
            case "none" | "server" | "several":
                return None
            case "live":
                return student
            case "ema":
                return OffloadedModel(student, torch.float32) if self._config.offload else student.copy(torch.float32)
            case "frozen":
                return initial(student, self._config.offload)
            case "external":
                dtype = DTYPES[config.model.dtype]
                assert self._config.path is not None
                model = load_model(self._config.path, key=key, dtype=dtype, weights=dtype, device=student.device)
                model.module.requires_grad_(False)
                return OffloadedModel(model) if self._config.offload else model

    @contextmanager
    def scoring(
        self, examples: Sequence[TrainExample], budget: Callable[[Sequence[int]], int]
    ) -> Iterator[Callable[[Progress | None], tuple[list[Target], dict[str, float]]]]:
        """Inside, what gives the targets of examples that all have a teacher prompt, and metrics. Servers are at work.

        Args:
            budget: tokens of a batch, given the lengths of the sequences.
        """
        if self.served is None:
            assert self.model is not None
            yield partial(read_by_model, self.model, examples, budget)
        else:
            with self.served.teaching(examples) as answers:
                yield partial(read_by_server, answers, self._device)

    @torch.no_grad()
    def follow(self, student: LanguageModel) -> None:
        """For `ema`: teacher ← (1 - rate)·teacher + rate·student, in float32. The other kinds do nothing here."""
        if self._config.kind != "ema":
            return
        assert self.model is not None
        averages = self.model.named_parameters()
        for name, current in student.trained().items():
            average = averages[name]
            if current.device != average.device:
                current = on_host(current, average.dtype)
            average.lerp_(current.to(average.dtype), self._config.ema_rate)

    def save(self, directory: Path) -> None:
        """Write an `ema` teacher in the form of the student. The other kinds are found elsewhere on a resume."""
        if self._config.kind == "ema" and self.model is not None:
            self.model.save(directory / "teacher")

    def load(self, directory: Path) -> None:
        """Continue from `save`."""
        if self._config.kind == "ema" and self.model is not None:
            self.model.load(directory / "teacher")


def initial(student: LanguageModel, offload: bool) -> LanguageModel:
    """The student as it is before its first update, which training does not move."""
    return OffloadedModel(student) if offload else student.initial()
