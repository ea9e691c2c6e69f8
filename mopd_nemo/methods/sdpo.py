"""Self-Distillation Policy Optimization: the paper's closest baseline (section 2 and 5).

The teacher reads one successful sibling, or the environment's feedback on the target when no sibling succeeded. A lone
success and a failure without feedback have nothing to read and are masked.
"""

from __future__ import annotations

from collections.abc import Sequence

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.lesson import Lesson
from mopd_nemo.methods.base import Method
from mopd_nemo.methods.distillation import distil
from mopd_nemo.peers.contexts import build_contexts
from mopd_nemo.types import RolloutGroup


class Sdpo(Method):
    """Distillation from one success."""

    def __init__(self, config: Config, chat: Chat) -> None:
        super().__init__(config, chat)
        self._peers = config.peers.model_copy(update={"successes": 1, "failures": 0, "when_no_success": "feedback"})

    def build(self, groups: Sequence[RolloutGroup], step: int) -> Lesson:
        """One success per context, feedback without one."""
        config = self.config
        contexts = build_contexts(groups, self.chat, self._peers, f"peers/{config.seed}/{step}")
        return distil(groups, contexts, config.divergence)
