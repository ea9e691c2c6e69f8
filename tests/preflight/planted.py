"""A model with known habits: right now and then by itself, right after a success, wrong once it has read a failure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from mopd_nemo.chat import Chat
from mopd_nemo.data.arithmetic import make_problems
from mopd_nemo.engines.base import OnRollout, Progress, Request
from mopd_nemo.types import Problem, Rollout

SUCCESS, FAILURE = "A correct solution", "A failed attempt"


class PlantedEngine:
    """Answers the built-in arithmetic problems.

    Args:
        habits: the chance to be right: `alone`, after a `success`, after a `failure`, after `both`. `copies`: the
            chance that a wrong answer after a failure is that failure.
    """

    def __init__(self, chat: Chat, problems: Sequence[Problem], **habits: float) -> None:
        self.chat = chat
        self._answers = {problem.messages[-1]["content"]: problem.answer for problem in problems}
        self._habits = {"alone": 0.5, "success": 0.9, "failure": 0.1, "both": 0.2, "copies": 0.8} | habits
        self.calls = 0

    def generate(
        self,
        request: Request,
        on_progress: Progress | None = None,
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        self.calls += 1
        return [
            [self._answer(prompt, random.Random(f"{request.seed}/{p}/{s}")) for s in range(request.num_samples)]
            for p, prompt in enumerate(request.prompts)
        ]

    def _answer(self, prompt: tuple[int, ...], rng: random.Random) -> Rollout:
        text = self.chat.decode(prompt)
        answer = next(answer for question, answer in self._answers.items() if question in text)
        read = (SUCCESS in text, FAILURE in text)
        chance = self._habits[
            {(False, False): "alone", (True, False): "success", (False, True): "failure"}.get(read, "both")
        ]
        right, copies = rng.random() < chance, rng.random() < self._habits["copies"]
        written = f"try {rng.randrange(10**6)}: \\boxed{{{answer if right else (int(answer) + 1) % 10}}}"
        if read[1] and copies and not right:
            written = text.partition(FAILURE)[2].split("\n\n")[1]
        ids = (*self.chat.encode(written), self.chat.tokenizer.eos_token_id)
        return Rollout(ids, self.chat.decode(ids), True, (-0.5,) * len(ids))

    def response_logprobs(
        self, prompts: Sequence[tuple[int, ...]], responses: Sequence[tuple[int, ...]], on_progress: Any = None
    ) -> list[tuple[float, ...]]:
        return [
            tuple(-len(prompt) / 100 - token / 1000 for token in r)
            for prompt, r in zip(prompts, responses, strict=True)
        ]


def arithmetic(num: int) -> list[Problem]:
    return make_problems("train", num)
