"""A verifier from outside the package judges problems that name it."""

import json
from pathlib import Path

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.data.load import read_problems
from mopd_nemo.types import Verdict
from mopd_nemo.verifiers.pool import VerifierPool

TASK = "examples.own_verifier:Words"


def write(path: Path, **changes: object) -> Path:
    row = {"id": "1", "prompt": "Name the primary colours.", "answer": ["red", "yellow", "blue"], "task": TASK}
    path.write_text(json.dumps(row | changes) + "\n")
    return path


def judge(problem_file: Path, *responses: str) -> list[Verdict]:
    (problem,) = read_problems(str(problem_file), "data.train")
    with VerifierPool(VerifierConfig(success_threshold=0.6), {problem.task}) as pool:
        return [pool.submit(problem.task, response, problem.answer).result() for response in responses]


def test_rewards_are_graded_and_the_threshold_makes_successes(tmp_path: Path) -> None:
    verdicts = judge(write(tmp_path / "p.jsonl"), "Red, yellow and blue.", "red and yellow", "red")
    assert [verdict.reward for verdict in verdicts] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert [verdict.success for verdict in verdicts] == [True, True, False]
    assert verdicts[1].feedback == "Not mentioned: blue."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "red"}, "answer='red': give a list of words"),
        ({"task": "examples.own_verifier:Word"}, "module examples.own_verifier has no Word"),
        ({"task": "word"}, "task=word: choose arithmetic, .* or write module:Name"),
    ],
)
def test_what_does_not_fit_is_said_when_problems_are_read(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_problems(str(write(tmp_path / "p.jsonl", **changes)), "data.train")
