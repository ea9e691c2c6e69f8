"""Held-out evaluation: mean@k, unbiased pass@k, majority vote, and bootstrap intervals over problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from math import comb
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.schema import pass_sizes
from mopd_nemo.engines.base import Engine, Progress, Request, Sampling
from mopd_nemo.peers.metrics import group_metrics
from mopd_nemo.types import Problem, RolloutGroup
from mopd_nemo.verifiers import verifier_class
from mopd_nemo.verifiers.pool import PendingVerdicts, VerifierPool

NUM_RESAMPLES = 2000
"""Of a bootstrap."""
MIN_PROBLEMS = 8
"""Problems without which a comparison is no ground for anything."""


def evaluate(
    engine: Engine,
    verifiers: VerifierPool,
    problems: Sequence[Problem],
    config: Config,
    on_progress: Progress | None = None,
) -> tuple[dict[str, float], list[RolloutGroup]]:
    """Metrics of the student on held-out problems, and its samples.

    The random numbers depend on the config's seed alone, so evaluations at different steps share them.
    """
    n = config.eval.num_samples
    prompts = [problem.prompt_ids for problem in problems]
    sampling = Sampling(config.rollout.max_response_tokens, config.eval.temperature, config.eval.top_p)
    verifying = PendingVerdicts(verifiers, engine.chat)
    samples = engine.generate(
        Request(prompts, n, sampling, f"eval/{config.seed}"),
        on_progress,
        on_rollout=lambda number, sample, rollout: verifying.add(problems[number], sample, rollout),
    )
    groups = [
        RolloutGroup(problem, tuple(rollouts), verdicts)
        for problem, rollouts, verdicts in zip(problems, samples, verifying.collect(problems, samples), strict=True)
    ]
    as_in_paper = paper_metrics(groups, n) if config.eval.paper_metrics else {}
    return evaluation_metrics(groups, n, verifiers) | as_in_paper, groups


def evaluation_metrics(groups: Sequence[RolloutGroup], n: int, verifiers: VerifierPool) -> dict[str, float]:
    """`mean@n` with its 95 % interval, `pass@k` for k = 1, 2, 4, ... n, `maj@n`, lengths and outcomes.

    `maj@n` is over the problems whose tasks have answers to vote on; it is absent if there are none.
    """
    correct = [[verdict.success is True for verdict in group.verdicts] for group in groups]
    num_correct = [sum(flags) for flags in correct]
    low, high = bootstrap_interval([c / n for c in num_correct])
    voting = [group for group in groups if verifiers.class_of(group.problem.task).votes]
    votes = [votes_of(group, verifiers) for group in voting]
    right = [[verdict.success is True for verdict in group.verdicts] for group in voting]
    observed = group_metrics(groups)
    return {
        f"mean@{n}": mean_at_k(num_correct, n),
        f"mean@{n}/low": low,
        f"mean@{n}/high": high,
        **{f"pass@{k}": fmean(pass_at_k(c, n, k) for c in num_correct) for k in pass_sizes(n)},
        **({f"maj@{n}": majority_at_k(votes, right)} if voting else {}),
        "num_problems": float(len(groups)),
        **{name: value for name, value in observed.items() if name.startswith(("response/", "outcome/"))},
    }


def check_votes(config: Config, problems: Sequence[Problem]) -> None:
    """Find out whether `train.keep_best` names a vote that no held-out problem takes.

    Raises:
        UserError: it does.
    """
    metric = config.train.keep_best or ""
    if metric.startswith("maj@") and not any(
        verifier_class(problem.task, config.verifier).votes for problem in problems
    ):
        raise UserError(
            f"train.keep_best={metric}: no task of data.eval={config.data.eval} has answers to vote on; choose "
            f"mean@{config.eval.num_samples}"
        )


def change_since(groups: Sequence[RolloutGroup], before: Mapping[str, float]) -> dict[str, float]:
    """`change` of the mean accuracy, problem by problem, with its 95 % interval; nothing without common problems.

    Args:
        before: share of right samples by problem id, of an earlier evaluation.
    """
    known = [group for group in groups if group.problem.id in before]
    if not known:
        return {}
    changes = [len(group.successes) / len(group.verdicts) - before[group.problem.id] for group in known]
    low, high = bootstrap_interval(changes)
    return {"change": fmean(changes), "change/low": low, "change/high": high}


def paper_metrics(groups: Sequence[RolloutGroup], n: int) -> dict[str, float]:
    """What the paper's code calls mean@n and pass@n, under names of their own (its `process_validation_metrics`).

    A program scores the share of the tests that it passes, any other response 1 or 0. pass@n is the expected best score
    of n draws with replacement from the n samples: one right sample of 8 counts 0.66, where unbiased pass@8 counts 1.

    Raises:
        UserError: a program was stopped at its first failed test.
    """
    scores = [[score(each.success, each.details, group.problem.id) for each in group.verdicts] for group in groups]
    return {
        f"paper/mean@{n}": fmean(fmean(of_problem) for of_problem in scores),
        f"paper/pass@{n}": fmean(best_with_replacement(of_problem, n) for of_problem in scores),
    }


def score(success: bool | None, details: Mapping[str, Any], problem: str) -> float:
    """Share of passed tests, where a response is a program with tests; else 1 for a success and 0 for anything else.

    Raises:
        UserError: not all tests were run.
    """
    if "tests" not in details:
        return float(success is True)
    if details.get("tests_run", details["tests"]) < details["tests"]:
        raise UserError(
            f"eval.paper_metrics=true counts passed tests, and a program for {problem} was stopped at its first failed "
            "one: set verifier.code.all_tests=true"
        )
    return details["passed"] / details["tests"]


def best_with_replacement(scores: Sequence[float], k: int) -> float:
    """Expected maximum of k draws with replacement."""
    n = len(scores)
    return sum(value * ((rank / n) ** k - ((rank - 1) / n) ** k) for rank, value in enumerate(sorted(scores), start=1))


def votes_of(group: RolloutGroup, verifiers: VerifierPool) -> list[int | None]:
    """The vote of each sample, as an index; answers that the task's verifier calls equal get the same one.

    None: no answer was found. Wrong answers are compared with each other only if that can change the winner.
    """
    answers = [verdict.details.get("found") for verdict in group.verdicts]
    votes: list[int | None] = [None if answer is None else index for index, answer in enumerate(answers)]
    successes = [index for index in group.successes if answers[index] is not None]
    for index in successes:
        votes[index] = successes[0]  # each equals the gold answer
    others = [index for index, vote in enumerate(votes) if vote is not None and index not in successes]
    firsts: list[int] = []
    for index in others if 0 < len(successes) <= len(others) else []:
        for first in firsts:
            equal = answers[first] == answers[index]
            if equal or verifiers.same(group.problem.task, str(answers[first]), str(answers[index])).result():
                votes[index] = first
                break
        else:
            firsts.append(index)
    return votes


def mean_at_k(num_correct: Sequence[int], k: int) -> float:
    """Mean accuracy over k samples of each problem: mean@k."""
    return fmean(c / k for c in num_correct)


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is right: 1 - C(n-c, k) / C(n, k).

    Args:
        num_correct: c, right samples among n.
        num_samples: n, at least k.
    """
    if k > num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {num_samples}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_at_k(answers: Sequence[Sequence[Hashable | None]], correct: Sequence[Sequence[bool]]) -> float:
    """Fraction of problems whose most frequent answer is right.

    Ties go to the first answer given. A sample without an answer (None) does not vote.
    """
    correct_majority = []
    for given, right in zip(answers, correct, strict=True):
        votes = Counter(answer for answer in given if answer is not None)
        winner = votes.most_common(1)[0][0] if votes else None
        correct_majority.append(winner is not None and right[list(given).index(winner)])
    return fmean(correct_majority)


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval of the mean of each column, by resampling rows (problems or prompts).

    Args:
        values: [problems, columns], at least one row. The same problems are drawn for every column.

    Returns:
        low and high, one number per column. With a single row, both are its values.
    """
    if len(values) < 2:
        return values[0], values[0]
    interval = stats.bootstrap(
        (values,), np.mean, axis=0, n_resamples=NUM_RESAMPLES, batch=100, method="percentile", rng=0
    ).confidence_interval
    return interval.low, interval.high


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """`bootstrap` of one column."""
    low, high = bootstrap(np.array(values, dtype=float)[:, None])
    return float(low[0]), float(high[0])


def has_interval(low: float, high: float, num_problems: float) -> bool:
    """Whether an interval over problems is one: a few that all give the same leave nothing to draw differently."""
    return low != high or num_problems >= MIN_PROBLEMS
