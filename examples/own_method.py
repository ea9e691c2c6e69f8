"""A method in one file: distillation from one peer, the shortest success.

    mopd train -c configs/quickstart.yaml method=examples.own_method:ShortestSuccess

Name it as `module:Name`. The module must be on the Python path or in the working directory.
"""

from __future__ import annotations

from collections.abc import Sequence

from mopd_nemo.losses.objectives import Divergence
from mopd_nemo.methods.base import Method, train_example
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import RolloutGroup


class ShortestSuccess(Method):
    """Every other rollout learns from a teacher that has read the group's shortest success."""

    teachers = ("ema", "live", "frozen", "external")
    uses = frozenset({"divergence.k", "rollout.importance_clip"})
    reads_peers = True

    def build(self, groups: Sequence[RolloutGroup], step: int) -> TrainBatch:
        """One example for each rollout but the shortest success itself."""
        examples = []
        for group_index, group in enumerate(groups):
            if not group.successes:
                continue
            shortest = min(group.successes, key=lambda i: len(group.rollouts[i].response_ids))
            prompt_ids = self._teacher_prompt(group, group.rollouts[shortest].text)
            examples += [
                train_example(groups, group_index, i, teacher_prompt_ids=prompt_ids)
                for i in range(len(group.rollouts))
                if i != shortest
            ]
        objective = Divergence("forward_kl", k=self.config.divergence.k)
        terms = [LossTerm(objective, tuple(range(len(examples))))] if examples else []
        return TrainBatch(examples, terms, {"examples": float(len(examples))})

    def _teacher_prompt(self, group: RolloutGroup, peer: str) -> tuple[int, ...]:
        *before, user = group.problem.messages
        content = f"{user['content']}\n\nA short correct solution:\n\n{self.chat.escape_control_tokens(peer)}"
        return self.chat.prompt_ids([*before, {"role": "user", "content": content}])
