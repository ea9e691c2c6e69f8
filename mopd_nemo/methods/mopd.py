"""Multi-Rollout On-Policy Distillation (paper section 4, algorithm 1), and its closest baseline.

Every rollout is scored by a teacher that reads peers of the same group: by default two successes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from mopd_nemo.config import Config, PeersConfig
from mopd_nemo.methods.base import Method, with_reference
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.methods.grpo import add_policy_gradient
from mopd_nemo.methods.opd import DISTILLATION, distil
from mopd_nemo.peers.metrics import dedupe_metrics
from mopd_nemo.peers.render import build_contexts, build_contrasts
from mopd_nemo.peers.select import candidates_of
from mopd_nemo.types import RolloutGroup


class Mopd(Method):
    """Peer-conditioned distillation. Every row of the paper's context ablation is a setting of `peers`."""

    teachers: ClassVar = ("ema", "live", "frozen", "external", "server")
    uses: ClassVar = DISTILLATION | {"divergence.contrast", "peers", "policy_gradient"}
    reads_peers: ClassVar = True

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Select and render peers for every rollout of every group; mix in the reward if asked."""
        config = self.config
        build = build_contrasts if config.divergence.contrast else build_contexts
        contexts = build(groups, self.chat, self.peers, f"peers/{config.seed}/{step}")
        batch = distil(groups, contexts, config)
        batch.metrics.update(dedupe_metrics(candidates_of(groups, self.chat, self.peers), self.peers))
        if config.policy_gradient.weight > 0:
            batch = add_policy_gradient(batch, groups, config.policy_gradient)
        return with_reference(batch, config)

    @property
    def peers(self) -> PeersConfig:
        """Which peers a context shows."""
        return self.config.peers

    @classmethod
    def idle(cls, config: Config) -> frozenset[str]:
        """Without a weight there is no policy gradient."""
        return frozenset({"policy_gradient"}) if config.policy_gradient.weight == 0 else frozenset()


class Sdpo(Mopd):
    """Self-Distillation Policy Optimization (sections 2 and 5): the teacher reads one successful sibling.

    Where no sibling succeeded it reads the environment's feedback on the target, if `sdpo.feedback` allows. A target
    with neither has no signal.
    """

    uses: ClassVar = (
        DISTILLATION
        | {"sdpo"}
        | {f"peers.{name}" for name in ("dedupe", "require", "order", "templates", "strip_thinking_successes")}
    )

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """One success or feedback for every rollout; see `peers`."""
        if self.config.sdpo.feedback == "informative":
            groups = [_without_empty_words(group) for group in groups]
        return super().build(groups, step)

    @property
    def peers(self) -> PeersConfig:
        """One success, feedback without one."""
        without = "skip" if self.config.sdpo.feedback == "none" else "feedback"
        return self.config.peers.model_copy(update={"successes": 1, "failures": 0, "when_no_success": without})


def _without_empty_words(group: RolloutGroup) -> RolloutGroup:
    """The group without feedback that says no more than that a rollout failed."""
    verdicts = (verdict if verdict.informative else replace(verdict, feedback="") for verdict in group.verdicts)
    return replace(group, verdicts=tuple(verdicts))
