"""Multi-Rollout On-Policy Distillation (paper section 4, algorithm 1), and its closest baseline.

Every rollout is scored by a teacher that reads a context: by default two successes of the same group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from mopd_nemo.config import Config
from mopd_nemo.methods.base import Method, with_reference
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.methods.grpo import add_policy_gradient
from mopd_nemo.methods.opd import DISTILLATION, distil
from mopd_nemo.peers.leaks import Leak, find_leaks, leak_metrics, leaking_tokens
from mopd_nemo.peers.metrics import dedupe_metrics
from mopd_nemo.peers.render import build_contexts, build_contrasts
from mopd_nemo.peers.select import candidates_of
from mopd_nemo.types import RolloutGroup


class Mopd(Method):
    """Context-conditioned distillation. What the teacher reads is a setting: `context`, and the block of each source.

    So are the rows of the paper's context ablation, SDPO, OPSD and SDFT (configs/methods).
    """

    teachers: ClassVar = ("ema", "live", "frozen", "external", "server")
    uses: ClassVar = DISTILLATION | {"context", "feedback", "leak", "divergence.contrast", "peers", "policy_gradient"}
    reads_peers: ClassVar = True

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """Build the context of every rollout of every group; mix in the reward if asked."""
        config, seed = self.config, f"peers/{self.config.seed}/{step}"
        leaks = find_leaks(groups, config.context, config.peers.templates, config.leak)
        hidden = {(g, r) for g, own in enumerate(leaks) for r, found in enumerate(own) if found}
        if config.leak.action != "no_peer":
            hidden = set()
        if config.divergence.contrast:
            contexts = build_contrasts(groups, self.chat, config.peers, seed, hidden)
        else:
            contexts = build_contexts(groups, self.chat, config.peers, seed, config.context, config.feedback, hidden)
        batch = replace(distil(groups, contexts, config), leaks=leaks)
        batch.metrics.update(leak_metrics(leaks))
        if "peers" in config.context:
            batch.metrics.update(dedupe_metrics(candidates_of(groups, self.chat, config.peers, hidden), config.peers))
        if config.policy_gradient.weight > 0:
            batch = add_policy_gradient(batch, groups, config.policy_gradient)
        if config.leak.action == "mask":
            batch = self._masked(batch, leaks)
        return with_reference(batch, config)

    def _masked(self, batch: TrainBatch, leaks: Sequence[Sequence[tuple[Leak, ...]]]) -> TrainBatch:
        """The batch without loss on tokens that leak."""
        examples = [
            replace(example, masked=leaking_tokens(found, example.response_ids, self.chat)) if found else example
            for example in batch.examples
            for found in [leaks[example.group_index][example.rollout_index]]
        ]
        return replace(batch, examples=examples)

    @classmethod
    def idle(cls, config: Config) -> frozenset[str]:
        """Without a weight there is no policy gradient; feedback that is not in the context is not read."""
        idle = {"policy_gradient": config.policy_gradient.weight == 0, "feedback": "feedback" not in config.context}
        return frozenset(key for key, unread in idle.items() if unread)


class Sdpo(Mopd):
    """Self-Distillation Policy Optimization (sections 2 and 5): settings under a name.

    The teacher reads one successful sibling, or where none succeeded the environment's feedback on the target. A
    target with neither has no signal.
    """

    uses: ClassVar = (
        DISTILLATION
        | {"context", "feedback.which", "leak"}
        | {f"peers.{name}" for name in ("dedupe", "require", "order", "templates", "strip_thinking_successes")}
    )
    preset: ClassVar = {"context": ("peers", "feedback"), "peers.successes": 1, "peers.failures": 0}
