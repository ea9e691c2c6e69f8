"""On-policy distillation without context (paper section 3): the teacher reads what the student read.

With an external teacher this is the usual teacher-student setting. With a frozen self-teacher it only pulls a student
back that was changed otherwise: at the start the two are the same model.
"""

from __future__ import annotations

from collections.abc import Sequence

from mopd_nemo.lesson import Lesson
from mopd_nemo.methods.base import Method
from mopd_nemo.methods.distillation import distil
from mopd_nemo.peers.contexts import PeerContext
from mopd_nemo.peers.select import Selection
from mopd_nemo.types import RolloutGroup


class Opd(Method):
    """Every rollout, the plain prompt."""

    def build(self, groups: Sequence[RolloutGroup], step: int) -> Lesson:
        """Every rollout has a signal, whatever its verdict."""
        contexts = [
            [PeerContext(Selection(plain=True), group.problem.prompt_ids) for _ in group.rollouts] for group in groups
        ]
        return distil(groups, contexts, self.config.divergence)
