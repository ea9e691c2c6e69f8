"""The problems of a run, and those of each step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mopd_nemo.config import Config
from mopd_nemo.data.arithmetic import SIZES, make_problems
from mopd_nemo.data.jsonl import read_problems
from mopd_nemo.data.rows import BadRows
from mopd_nemo.types import Message, Problem
from mopd_nemo.verifiers.pool import VerifierPool


def load_problems(config: Config, split: Literal["train", "eval"]) -> list[Problem]:
    """The problems of one split, in a fixed order.

    Raises:
        UserError: the file is missing, empty or malformed.
    """
    source = config.data.train if split == "train" else config.data.eval
    limit = config.data.num_train if split == "train" else config.data.num_eval
    if source == "arithmetic":
        problems = make_problems(split, min(limit or SIZES[split], SIZES[split]))
    else:
        problems = read_problems(source, f"data.{split}", BadRows(config.data.on_bad_row))[:limit]
    return [_with_suffix(problem, config.data.prompt_suffix) for problem in problems]


def judgeable(
    problems: Sequence[Problem], verifiers: VerifierPool, config: Config, split: Literal["train", "eval"]
) -> list[Problem]:
    """The problems whose gold answers can be judged by: equal to themselves, and within the time limit.

    Raises:
        UserError: one cannot, and `data.on_bad_row` says to stop.
    """
    bad = BadRows(config.data.on_bad_row)
    source = config.data.train if split == "train" else config.data.eval
    faults = [verifiers.gold_fault(problem.task, problem.answer) for problem in problems]
    kept = []
    for problem, fault in zip(problems, faults, strict=True):
        if reason := fault.result():
            bad.report(source, f"id {problem.id!r}", reason)
        else:
            kept.append(problem)
    return kept


def _with_suffix(problem: Problem, suffix: str) -> Problem:
    *before, user = problem.messages
    return replace(problem, messages=(*before, Message(role="user", content=user["content"] + suffix)))


def problems_of_step(problems: Sequence[Problem], step: int, batch_size: int, seed: int) -> list[Problem]:
    """The `batch_size` problems of 1-based `step`: a pure function, so that a resumed run needs no iterator state.

    Each epoch is a fresh seeded shuffle, so no problem comes twice in a step.

    An epoch's last incomplete batch is dropped, as its problems would meet again at once in the next epoch.
    """
    steps_per_epoch = len(problems) // batch_size
    epoch, position = divmod(step - 1, steps_per_epoch)
    order = list(range(len(problems)))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return [problems[i] for i in order[position * batch_size : (position + 1) * batch_size]]
