"""The policies of NeMo-RL's distillation loop, with the methods that this package adds to their workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from nemo_rl.algorithms import distillation
from nemo_rl.models.policy.lm_policy import Policy

from mopd_nemo.config import Config, TeacherConfig, UserError
from mopd_nemo.engines.nemo.launch import BACKENDS
from mopd_nemo.engines.nemo.workers.divergence_loss import DivergenceLoss
from mopd_nemo.losses.objectives import Divergence


class StudentPolicy(Policy):
    """NeMo-RL's policy, beside which its past self lives: it moves after every step and lies in every checkpoint.

    A step that teaches nothing is no update: Adam would move weights on a gradient of zeros.
    """

    def __init__(self, *args: Any, past_self: TeacherConfig, weights_path: Any = None, **own: Any) -> None:
        super().__init__(*args, weights_path=weights_path, **own)
        self._past_self = past_self
        if past_self.kind in ("ema", "frozen"):
            saved = None if weights_path is None else _beside(weights_path)
            if saved is not None and not saved.is_dir():
                raise UserError(
                    f"{saved}: missing; the checkpoint was saved without a teacher of "
                    f"peer_teacher.teacher.kind={past_self.kind}: continue with the kind that it was saved with"
                )
            directory = None if saved is None else str(saved)
            self.run_all_workers_single_data("start_teacher", kind=past_self.kind, directory=directory)

    def train(self, data: Any, *args: Any, **own: Any) -> dict[str, Any]:
        """One update, if there is something to learn; an EMA moves after every step."""
        if data["sample_mask"].any():
            result = super().train(data, *args, **own)
        else:
            counts = {"global_valid_seqs": [0.0], "global_valid_toks": [0.0]}
            result = {"loss": torch.zeros(()), "grad_norm": torch.zeros(()), "all_mb_metrics": counts}
        if self._past_self.kind == "ema":
            self.run_all_workers_single_data("follow_student", rate=self._past_self.ema_rate)
        return result

    def save_checkpoint(self, weights_path: str, *args: Any, **own: Any) -> None:
        """NeMo-RL's checkpoint; the past self goes into `teacher` beside `policy`."""
        super().save_checkpoint(weights_path, *args, **own)
        if self._past_self.kind in ("ema", "frozen"):
            self.run_all_workers_single_data("save_teacher", directory=str(_beside(weights_path)))


def _beside(weights_path: str | Path) -> Path:
    """`STEP/teacher` for `STEP/policy/weights`."""
    return Path(weights_path).absolute().parents[1] / "teacher"


class _NoPolicy:
    """What `setup` makes of the teacher's config where the student is its own teacher: no second model."""

    def offload_after_refit(self) -> None:
        """There is nothing to move."""


@contextmanager
def peer_policies(settings: Config) -> Iterator[None]:
    """While entered, `distillation.setup` makes policies whose workers have this package's methods.

    NeMo-RL's other algorithms take a `policy_factory` for that; this one calls `Policy`, so that a factory stands under
    the name meanwhile.
    """

    def make(*, name_prefix: str, **arguments: Any) -> Any:
        worker = BACKENDS["megatron"].worker
        if name_prefix == "student":
            return StudentPolicy(
                name_prefix=name_prefix,
                worker_extension_cls_fqn=worker,
                past_self=settings.teacher,
                **arguments,
            )
        if settings.teacher.kind != "external":
            return _NoPolicy()
        return Policy(name_prefix=name_prefix, worker_extension_cls_fqn=worker, **arguments)

    distillation.Policy = make
    try:
        yield
    finally:
        distillation.Policy = Policy


def divergence_loss(settings: Config, vocab_size: int) -> DivergenceLoss:
    """The loss of the loop: the configured divergence on the tokens that the teacher names.

    A contrast is in the targets already.
    """
    own = settings.divergence
    k = min(own.k, vocab_size)
    return DivergenceLoss(
        Divergence(
            own.kind,
            alpha=own.alpha,
            support="teacher_topk",
            k=k,
            tail=own.tail,
            weights=own.weights,
            entry_clip=own.entry_clip,
        ),
        aggregation=settings.train.aggregation,
        vocab_size=vocab_size,
        watch=k,
        student_support=own.support == "student_topk",
    )
