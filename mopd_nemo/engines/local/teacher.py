"""Teacher weights: the student itself, its moving average, its initial weights, or another model."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from mopd_nemo.config import Config, TeacherConfig
from mopd_nemo.engines.local.model import DTYPES, LanguageModel, load_model


class Teacher:
    """The model whose distribution the student follows; `model` is None without a teacher.

    `live` shares the student's weights, so it moves with every update. `ema` is a float32 copy. `frozen` and
    `external` never move and are loaded from their model directory, so only `ema` has a state of its own to save.
    """

    def __init__(self, student: LanguageModel, config: Config) -> None:
        self._config: TeacherConfig = config.teacher
        self.model = self._make(student, config)

    def _make(self, student: LanguageModel, config: Config) -> LanguageModel | None:
        match self._config.kind:
            case "none":
                return None
            case "live":
                return student
            case "ema" | "frozen":
                return LanguageModel(copy.deepcopy(student.module).requires_grad_(False), student.dtype)
            case "external":
                dtype = DTYPES[config.model.dtype]
                assert self._config.path is not None
                model = load_model(
                    self._config.path, key="teacher.path", dtype=dtype, weights=dtype, device=student.device
                )
                model.module.requires_grad_(False)
                return model

    @torch.no_grad()
    def follow(self, student: LanguageModel) -> None:
        """For `ema`: teacher ← (1 - rate)·teacher + rate·student, in float32. Other kinds do not move."""
        if self._config.kind != "ema":
            return
        assert self.model is not None
        current = student.named_parameters()
        for name, average in self.model.named_parameters().items():
            average.lerp_(current[name], self._config.ema_rate)

    def save(self, directory: Path) -> None:
        """Write what a resume cannot find elsewhere, as a Hugging Face model."""
        if self._config.kind == "ema" and self.model is not None:
            self.model.module.save_pretrained(directory / "teacher")

    def load(self, directory: Path) -> None:
        """Continue from `save`."""
        if self._config.kind == "ema" and self.model is not None:
            load_weights(self.model, directory / "teacher")


def load_weights(model: LanguageModel, directory: Path) -> None:
    """Copy the weights of a saved Hugging Face model into one that is already built, without changing their type."""
    saved = type(model.module).from_pretrained(directory, dtype=next(model.module.parameters()).dtype)
    model.module.load_state_dict(saved.state_dict())
