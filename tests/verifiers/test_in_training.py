"""A run whose responses are judged by worker processes while others are still being sampled."""

from pathlib import Path

import pytest

from mopd_nemo.config.load import load_config
from mopd_nemo.data.arithmetic import make_problems
from mopd_nemo.data.load import write_problems
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.files import read_rows
from mopd_nemo.types import Problem, Rollout
from mopd_nemo.verifiers.pool import VerifierPool
from tests.conftest import QUICKSTART
from tests.test_trainer import new_run


def as_math(problem: Problem) -> Problem:
    return Problem(problem.id, problem.messages, problem.answer, "math")


def test_every_rollout_is_announced_once_as_it_is_returned() -> None:
    engine = LocalEngine(load_config(QUICKSTART, ["teacher.kind=live", "rollout.batch_size=4"]))
    prompts = [engine.chat.prompt_ids(problem.messages) for problem in make_problems("train", 6)]
    announced: dict[tuple[int, int], Rollout] = {}

    def note(prompt: int, sample: int, rollout: Rollout) -> None:
        assert (prompt, sample) not in announced
        announced[prompt, sample] = rollout

    returned = engine.generate(Request(prompts, 2, Sampling(40), "seed"), on_rollout=note)
    assert announced == {(p, s): returned[p][s] for p in range(6) for s in range(2)}
    assert {rollout.finished for rollout in announced.values()} == {True, False}


def test_a_run_judged_by_workers_is_the_run_judged_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[VerifierPool] = []
    make = VerifierPool.__init__

    def remember(self: VerifierPool, *arguments: object) -> None:
        make(self, *arguments)  # type: ignore[arg-type]
        pools.append(self)

    monkeypatch.setattr(VerifierPool, "__init__", remember)
    problems = make_problems("train", 16)
    files = {task: tmp_path / f"{task}.jsonl" for task in ("arithmetic", "math")}
    write_problems(files["arithmetic"], problems)
    write_problems(files["math"], map(as_math, problems))
    settings = ["train.num_steps=1", "train.eval_every=0", "verifier.workers=2"]
    runs = [new_run(tmp_path / task, *settings, f"data.train={file}") for task, file in files.items()]
    first, second = (read_rows(run.metrics_file)[0] for run in runs)
    for name in ("success_rate", "outcome/correct", "outcome/wrong", "outcome/verifier_error", "loss", "signal"):
        assert first[name] == second[name]
    in_place, by_workers = pools
    assert not in_place._workers
    assert len(by_workers._workers) == 2 and all(worker._process is None for worker in by_workers._workers)
