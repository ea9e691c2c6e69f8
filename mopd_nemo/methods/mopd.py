"""Multi-Rollout On-Policy Distillation (paper section 4, algorithm 1), and its closest baseline.

Every rollout is scored by a teacher that reads a context: by default two successes of the same group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from mopd_nemo.config import Config, PeersConfig, RequireConfig
from mopd_nemo.methods.base import Method, with_reference
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.methods.grpo import add_policy_gradient
from mopd_nemo.methods.opd import DISTILLATION, Opd, distil
from mopd_nemo.peers.leaks import Leak, find_leaks, leak_metrics, leaking_tokens
from mopd_nemo.peers.metrics import dedupe_metrics
from mopd_nemo.peers.render import build_contexts, build_contrasts
from mopd_nemo.peers.select import candidates_of
from mopd_nemo.types import RolloutGroup

SHARED = ("require", "templates", "max_peer_tokens", "max_summary_tokens", "max_context_tokens")
"""Settings under `peers` that hold whatever the context shows."""
COUNTED = ("dedupe", "strip_thinking_successes", "strip_thinking_failures")
"""Those by which `peers.require` counts."""


class Mopd(Method):
    """Context-conditioned distillation. What the teacher reads is a setting: `context`, and the block of each source.

    So are the rows of the paper's context ablation, SDPO, OPSD and SDFT (configs/methods).
    """

    teachers: ClassVar = ("ema", "live", "frozen", "external", "server")
    uses: ClassVar = DISTILLATION | {
        *("context", "data.privileged_column", "feedback", "leak", "divergence.contrast", "peers", "policy_gradient")
    }
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
    def idle(cls, config: Config) -> dict[str, tuple[str, str]]:
        """What belongs to a source that the context does not name, or to a reward that is not mixed in."""
        idle, context = Opd.idle(config), config.context
        shown = f"context=[{', '.join(context)}]"
        if not config.policy_gradient.weight:
            idle["policy_gradient"] = ("policy_gradient.weight=0", "mix in the reward with policy_gradient.weight")
        if "feedback" not in context:
            idle["feedback"] = (shown, "add feedback to context")
        if "peers" not in context:
            required = COUNTED if config.peers.require != RequireConfig() else ()
            unread = [f"peers.{name}" for name in PeersConfig.model_fields if name not in (*SHARED, *required)]
            if config.leak.action == "no_peer":
                unread.append("leak.action")
            idle |= dict.fromkeys(unread, (shown, "add peers to context"))
        if "privileged" not in context:
            idle["leak.words"] = (shown, "add privileged to context")
            if not any(":" in source for source in context):
                idle["data.privileged_column"] = idle["leak.words"]
        return idle


class Sdpo(Mopd):
    """Self-Distillation Policy Optimization (sections 2 and 5): settings under a name.

    The teacher reads one successful sibling, or where none succeeded the environment's feedback on the target. A
    target with neither has no signal.
    """

    uses: ClassVar = (
        DISTILLATION
        | {"context", "data.privileged_column", "feedback.which", "leak"}
        | {f"peers.{name}" for name in ("dedupe", "require", "order", "templates", "strip_thinking_successes")}
    )
    preset: ClassVar = {"context": ("peers", "feedback"), "peers.successes": 1, "peers.failures": 0}
