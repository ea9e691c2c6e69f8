"""Sample groups, let the model write after each context, and score the rollouts under it. Works on any engine.

Whoever writes is the student, with its present weights: the teacher of a run that starts there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.data.load import problems_of_step
from mopd_nemo.engines.base import Engine, Request, Sampling
from mopd_nemo.preflight.contexts import PLAIN, WHOLE_FORMS, Case, Reach, form_of, survey
from mopd_nemo.types import Problem, Rollout, RolloutGroup
from mopd_nemo.verifiers.pool import PendingVerdicts, VerifierPool

Row = dict[str, Any]
"""What one problem gave in one context."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and on how much."""

    contexts: tuple[str, ...]
    """Without `PLAIN`, which is always measured."""
    problems: int
    """Problems with every context to look for."""
    max_groups: int
    """Groups to sample at most while looking."""
    samples: int
    """Responses to write for each problem and context."""
    seed: str
    """Names the measurement uniquely within a run; the same seed and weights give the same draws."""
    order: int
    """Seed of the order in which problems are tried."""
    score: bool = True
    """Also score the rollouts under each context."""

    @property
    def measured(self) -> tuple[str, ...]:
        """All contexts, `PLAIN` first."""
        return (PLAIN, *self.contexts)


class Survey:
    """The groups so far, the problems among them that have every context, and the reach of each."""

    def __init__(self, plan: Plan, chat: Chat, config: Config) -> None:
        self._plan, self._chat, self._config = plan, chat, config
        self._cases: list[Case] = []
        self.groups: list[RolloutGroup] = []
        self.reach = dict.fromkeys(plan.contexts, Reach())

    def add(self, groups: Sequence[RolloutGroup]) -> None:
        """Take in the groups of one step."""
        seed = f"{self._plan.seed}/peers/{len(self.groups)}"
        cases, reach = survey(groups, self._chat, self._config, self._plan.contexts, seed)
        self.groups += groups
        self._cases += cases
        self.reach = {name: self.reach[name] + reach[name] for name in reach}

    @property
    def cases(self) -> list[Case]:
        """As many as the plan asks for, in order."""
        return self._cases[: self._plan.problems]

    @property
    def enough(self) -> bool:
        """Nothing more has to be sampled."""
        return len(self._cases) >= self._plan.problems or len(self.groups) >= self._plan.max_groups


def sample_groups(
    problems: Sequence[Problem], engine: Engine, verifiers: VerifierPool, config: Config, plan: Plan, found: Survey
) -> Iterator[list[RolloutGroup]]:
    """Sample each problem once, a step's worth at a time, until the survey has enough."""
    rollout = config.rollout
    sampling = Sampling(rollout.max_response_tokens, rollout.temperature)
    while not found.enough:
        step = len(found.groups) // rollout.num_prompts_per_step + 1
        chosen = problems_of_step(problems, step, rollout.num_prompts_per_step, plan.order)
        judging = PendingVerdicts(verifiers, engine.chat)
        samples = engine.generate(
            Request(
                [problem.prompt_ids for problem in chosen],
                rollout.num_rollouts_per_prompt,
                sampling,
                f"{plan.seed}/groups/{step}",
            ),
            on_rollout=_judging(judging, chosen),
        )
        groups = [
            RolloutGroup(problem, tuple(rollouts), verdicts)
            for problem, rollouts, verdicts in zip(chosen, samples, judging.collect(chosen, samples), strict=True)
        ]
        found.add(groups)
        yield groups


def measure(
    cases: Sequence[Case],
    engine: Engine,
    verifiers: VerifierPool,
    config: Config,
    plan: Plan,
    done: Container[tuple[str, str]] = frozenset(),
) -> Iterator[Row]:
    """A row for each problem and context, a batch of problems in one context at a time.

    All contexts of a batch share their random numbers, which makes their differences less noisy.

    Args:
        done: problems and contexts whose rows are there already. A batch that lacks any is computed as a whole.
    """
    size = max(config.rollout.batch_size // plan.samples, 1)
    for start in range(0, len(cases), size):
        batch = cases[start : start + size]
        for name in plan.measured:
            missing = [i for i, case in enumerate(batch) if (case.group.problem.id, name) not in done]
            if missing:
                rows = _measure_batch(name, batch, engine, verifiers, config, plan, f"{plan.seed}/written/{start}")
                yield from (rows[i] for i in missing)


def _measure_batch(
    name: str,
    batch: Sequence[Case],
    engine: Engine,
    verifiers: VerifierPool,
    config: Config,
    plan: Plan,
    seed: str,
) -> list[Row]:
    began = time.perf_counter()
    problems = [case.group.problem for case in batch]
    prompts = [case.contexts[name][0].prompt_ids or () for case in batch]
    sampling = Sampling(config.rollout.max_response_tokens, config.rollout.temperature)
    judging = PendingVerdicts(verifiers, engine.chat)
    written = engine.generate(Request(prompts, plan.samples, sampling, seed), on_rollout=_judging(judging, problems))
    verdicts = judging.collect(problems, written)
    wrote = time.perf_counter()
    scores = _scores(name, batch, engine) if plan.score else [[] for _ in batch]
    seconds = {"write": wrote - began, "score": time.perf_counter() - wrote}
    return [
        {
            "problem": case.group.problem.id,
            "context": name,
            "prompt": engine.chat.decode(prompt, skip_special_tokens=False),
            "texts": [rollout.text for rollout in rollouts],
            "success": [verdict.success for verdict in judged],
            "finished": [rollout.finished for rollout in rollouts],
            "tokens": [len(rollout.response_ids) for rollout in rollouts],
            "logprobs": [sum(rollout.logprobs) if rollout.logprobs else None for rollout in rollouts],
            "shown_failures": _shown_failures(case, name),
            "targets": [bool(case.group.verdicts[i].success) for i in case.targets],
            "scores": own,
            "seconds": {phase: value / len(batch) for phase, value in seconds.items()},
        }
        for case, prompt, rollouts, judged, own in zip(batch, prompts, written, verdicts, scores, strict=True)
    ]


def _scores(name: str, batch: Sequence[Case], engine: Engine) -> list[list[float]]:
    """Per problem and target, the log-probability of the whole response under the context."""
    prompts = [context.prompt_ids or () for case in batch for context in case.contexts[name]]
    responses = [case.group.rollouts[i].response_ids for case in batch for i in case.targets]
    found = iter(engine.response_logprobs(prompts, responses))
    return [[sum(next(found)) for _ in case.targets] for case in batch]


def _shown_failures(case: Case, name: str) -> list[str]:
    """The failures whose whole text the first target's teacher reads."""
    if form_of(name) not in WHOLE_FORMS:
        return []
    peers = case.contexts[name][0].selection.full_peers
    return [case.group.rollouts[peer.rollout_index].text for peer in peers if peer.kind == "failure"]


def _judging(judging: PendingVerdicts, problems: Sequence[Problem]) -> Callable[[int, int, Rollout], None]:
    return lambda number, sample, rollout: judging.add(problems[number], sample, rollout)
