"""The data of NeMo-RL's loop: a processor for its data sets, and the verdicts of its environments.

The loop hands a teacher token ids alone. The problem behind a prompt is found by the prompt's ids, the verdict on a
response by the texts that an environment judged.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from mopd_nemo.chat import Chat, with_prompt_ids
from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.types import Message, Outcome, Problem, Verdict
from mopd_nemo.verifiers.base import decide

PROCESSOR = "mopd_data_processor"
"""Name of `ProblemBook.process` in NeMo-RL's registry: `data.default.processor` of a config."""
CUT_PROMPT = 4
"""Tokens that are left of a prompt that is too long, as in NeMo-RL's own processors: nothing is learned from it."""


class ProblemBook:
    """Makes prompts of a data set's rows, and finds the problem again by the ids of its prompt.

    NeMo-RL processes rows in the driver, where its loop runs too.
    """

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._problems: dict[tuple[int, ...], Problem] = {}

    def register(self) -> None:
        """Make the processor known to NeMo-RL, before it loads data."""
        from nemo_rl.data.processors import PROCESSOR_REGISTRY

        PROCESSOR_REGISTRY[PROCESSOR] = self.process  # `register_processor` refuses a second run in a process

    def process(
        self, datum_dict: Mapping[str, Any], task_data_spec: Any, tokenizer: Any, max_seq_length: int, idx: int
    ) -> dict[str, Any]:
        """A row of a NeMo-RL response data set as its `DatumSpec`; a `TaskDataProcessFnCallable`.

        Args:
            datum_dict: `messages`, of which the last is the assistant's and holds the gold answer, and `task_name`.
            task_data_spec: its `prompt`, with `{}` for the user's turn, and its `system_prompt` are applied.
            tokenizer: not used: the chat has it.
            max_seq_length: longest prompt. One that is as long is cut, and counts in no loss.
            idx: of the row in the data set.
        """
        *turns, gold = datum_dict["messages"]
        if not turns or gold["role"] != "assistant":
            raise UserError(
                f"row {idx} of {datum_dict['task_name']}: {PROCESSOR} needs messages that end with the user's question "
                "and, as the assistant's turn, the gold answer"
            )
        *before, question = (Message(role=turn["role"], content=turn["content"]) for turn in turns)
        if task_data_spec.prompt:
            question = Message(role="user", content=task_data_spec.prompt.format(question["content"]))
        if task_data_spec.system_prompt:
            before.insert(0, Message(role="system", content=task_data_spec.system_prompt))
        task = datum_dict["task_name"]
        problem = Problem(f"{task}/{idx}", (*before, question), gold["content"], task)
        (problem,) = with_prompt_ids([problem], self._chat, sys.maxsize)
        fits = len(problem.prompt_ids) < max_seq_length
        ids = problem.prompt_ids if fits else problem.prompt_ids[:CUT_PROMPT]
        if fits:
            self._problems[ids] = problem
        return {
            "message_log": [
                {"role": "user", "content": self._chat.prompt_text(problem.messages), "token_ids": torch.tensor(ids)}
            ],
            "length": len(problem.prompt_ids),
            "extra_env_info": {"answer": problem.answer},
            "loss_multiplier": 1.0 if fits else 0.0,
            "idx": idx,
            "task_name": task,
        }

    def problem(self, prompt_ids: tuple[int, ...]) -> Problem:
        """The problem of a prompt that `process` has made.

        Raises:
            UserError: it has not.
        """
        if prompt_ids not in self._problems:
            raise UserError(
                f"the prompt {self._chat.decode(prompt_ids[:20])!r}... was made by another data processor: set "
                f"processor: {PROCESSOR} for every data set (data.default.processor)"
            )
        return self._problems[prompt_ids]

    def prompt_text(self, problem: Problem) -> str:
        """The templated prompt, as environments see it."""
        return self._chat.prompt_text(problem.messages)


class Verdicts:
    """What environments have said of the responses of a step, by the texts of prompt and response."""

    def __init__(self) -> None:
        self._asked: list[tuple[Sequence[Sequence[Mapping[str, Any]]], Any]] = []
        self._known: dict[tuple[str, str], Verdict] = {}

    def watch(self, environments: Mapping[str, Any]) -> dict[str, Any]:
        """The same NeMo-RL environments; what they answer is kept here too."""
        return {name: _Watched(environment, self._asked) for name, environment in environments.items()}

    def collect(self) -> None:
        """Take in what has been asked since the last time, and forget what was before."""
        import ray

        self._known = {}
        for logs, answer in self._asked:
            result = ray.get(answer)
            if len(result.rewards) and getattr(result.rewards[0], "ndim", 0):
                raise UserError("an environment of data.*.env_name gives several rewards a response: peers need one")
            infos = result.metadata or [None] * len(logs)
            for log, info, reward, seen in zip(logs, infos, result.rewards, result.observations, strict=True):
                *before, response = log
                text = "".join(str(message["content"]) for message in before)
                self._known[text, str(response["content"])] = _verdict(info, float(reward), seen)
        self._asked.clear()

    def of(self, prompt: str, response: str) -> Verdict:
        """The verdict on a response.

        Raises:
            UserError: no environment was asked about it.
        """
        if (prompt, response) not in self._known:
            raise UserError(f"no environment has judged the response {response[:60]!r}... to {prompt[-60:]!r}")
        return self._known[prompt, response]


def _verdict(info: Mapping[str, Any] | None, reward: float, seen: Mapping[str, Any]) -> Verdict:
    """That of our environments; of NeMo-RL's own, what reward and observation say."""
    if info is not None and "verdict" in info:
        return info["verdict"]
    threshold = VerifierConfig().success_threshold
    outcome = Outcome.CORRECT if reward >= threshold else Outcome.WRONG
    return decide(Verdict(reward, outcome, "" if outcome is Outcome.CORRECT else str(seen["content"])), threshold)


class _Watched:
    """An environment's actor handle; every call of `step.remote` is noted."""

    def __init__(self, environment: Any, asked: list[Any]) -> None:
        self._environment = environment
        self._asked = asked
        self.step = SimpleNamespace(remote=self._step)

    def _step(self, message_logs: Sequence[Any], metadata: Sequence[Any]) -> Any:
        answer = self._environment.step.remote(message_logs, metadata)
        self._asked.append((message_logs, answer))
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)
