"""Multi-Rollout On-Policy Distillation (paper section 4, algorithm 1).

Every rollout is scored by a teacher that reads peers of the same group: by default two successes and one failure.
"""

from __future__ import annotations

from collections.abc import Sequence

from mopd_nemo.lesson import Lesson
from mopd_nemo.methods.base import Method
from mopd_nemo.methods.distillation import distil
from mopd_nemo.methods.grpo import add_policy_gradient
from mopd_nemo.peers.contexts import build_contexts
from mopd_nemo.types import RolloutGroup


class Mopd(Method):
    """Peer-conditioned distillation. Every row of the paper's context ablation is a setting of `peers`."""

    def build(self, groups: Sequence[RolloutGroup], step: int) -> Lesson:
        """Select and render peers for every rollout of every group; mix in the reward if asked."""
        config = self.config
        contexts = build_contexts(groups, self.chat, config.peers, f"peers/{config.seed}/{step}")
        lesson = distil(groups, contexts, config.divergence)
        if config.policy_gradient.weight > 0:
            return add_policy_gradient(lesson, groups, config.policy_gradient)
        return lesson
