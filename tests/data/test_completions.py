"""Completions of a teacher: whole after any stop, refused where they do not fit."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.data.arithmetic import make_problems
from mopd_nemo.data.completions import read_completions, write_completions
from mopd_nemo.types import Problem, Rollout
from tests.conftest import EMBEDDED, QUICKSTART

PROBLEMS = make_problems("train", 11)


def config(file: Path, *overrides: str) -> Config:
    return load_config(
        QUICKSTART,
        [
            "method=gkd",
            f"teacher.path={EMBEDDED}",
            f"gkd.completions={file}",
            "rollout.num_prompts_per_step=4",
            *overrides,
        ],
    )


def write(some: Sequence[Problem], seed: str) -> list[list[Rollout]]:
    """The response names the problem and the draw."""
    return [[Rollout((1, 2), f"{problem.id} {seed} {i}", True, ())] for i, problem in enumerate(some)]


def test_every_problem_has_completions(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "completions.jsonl"
    write_completions(file, PROBLEMS, config(file), write)
    completions = read_completions(config(file), PROBLEMS)
    assert list(completions) == [problem.id for problem in PROBLEMS], "the last incomplete batch too"
    assert completions[PROBLEMS[-1].id][0].text == f"{PROBLEMS[-1].id} complete/0/8 2"


@pytest.mark.parametrize("keep", [0, 1, 3, 5, 9, 11])
@pytest.mark.parametrize("torn", ["", '{"problem": "arit'])
def test_a_stopped_run_goes_on_to_the_same_file(tmp_path: Path, keep: int, torn: str) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    write_completions(whole, PROBLEMS, config(whole), write)
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[: 1 + keep]) + torn)
    write_completions(part, PROBLEMS, config(part), write)
    assert part.read_text() == whole.read_text()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    file = tmp_path / "completions.jsonl"
    with pytest.raises(UserError, match="no such file; write it with `mopd complete"):
        read_completions(config(file), PROBLEMS)
    write_completions(file, PROBLEMS[:8], config(file), write)
    with pytest.raises(UserError, match=rf"no completions of 3 of the 11 problems of .*: {re.escape(PROBLEMS[8].id)}"):
        read_completions(config(file), PROBLEMS)
    with pytest.raises(UserError, match=r"written with rollout.temperature=1.0, this run has 0.5; name another"):
        read_completions(config(file, "rollout.temperature=0.5"), PROBLEMS)
    with pytest.raises(UserError, match=r"written with data.prompt_suffix='', this run has ' Be brief.'"):
        read_completions(config(file, "data.prompt_suffix=' Be brief.'"), PROBLEMS)
    with pytest.raises(UserError, match=r"written with seed=0, this run has 1"):
        write_completions(file, PROBLEMS, config(file, "seed=1"), write)
    with pytest.raises(UserError, match=r"its problems are not those of data.train=arithmetic"):
        write_completions(file, PROBLEMS[1:], config(file), write)
