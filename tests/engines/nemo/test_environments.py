"""The judging without Ray everywhere; the actor where NeMo-RL is."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mopd_nemo.config import UserError
from mopd_nemo.engines.nemo import environments
from mopd_nemo.engines.nemo.environments import ResponseJudge, observation
from mopd_nemo.types import Outcome
from tests.integration.nemo import cpu

ROOT = Path(__file__).parents[3]
LOGS = [
    [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>A</answer>"}],
    [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>B</answer>"}],
    [{"role": "user", "content": "?"}],
    [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<answer>A</answer>"}],
]
METADATA = [{"answer": "A"}, {"ground_truth": "A"}, {"answer": "A"}, {"answer": "Paris"}]


def test_conversations_are_judged_in_order() -> None:
    judge = ResponseJudge({"task": "choice", "verifier": {"choice": {"format": "strict"}}})
    verdicts = judge.judge(LOGS, METADATA)
    assert [v.outcome for v in verdicts] == [
        Outcome.CORRECT, Outcome.WRONG, Outcome.BAD_FORMAT, Outcome.VERIFIER_ERROR,
    ]  # fmt: skip
    assert observation(verdicts[1]) == {"role": "environment", "content": "Environment: wrong\nThe answer B is wrong."}
    assert "verifier_error" in observation(verdicts[3])["content"]
    batch = {"rewards": torch.tensor([1.0, 0.0, 0.0, 0.0]), "is_end": torch.tensor([1, 1, 1, 0])}
    assert judge.metrics(batch) == {
        "accuracy": 0.25, "fraction_of_samples_properly_ended": 0.75, "verifier_error_fraction": 0.25,
    }  # fmt: skip


def test_an_answer_inside_thinking_that_the_prompt_opened_is_none() -> None:
    judge = ResponseJudge({"task": "choice"})
    turns = ["<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n", "<|im_start|>assistant\n<think></think>\n"]
    answers = ["maybe <answer>A</answer>", "so</think><answer>A</answer>"]
    logs = [
        [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        for turn in turns
        for answer in answers
    ]
    outcomes = [verdict.outcome for verdict in judge.judge(logs, [{"answer": "A"}] * len(logs))]
    assert outcomes == [Outcome.BAD_FORMAT, *[Outcome.CORRECT] * 5]


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(UserError, match="task=None: unknown; choose one of arithmetic"):
        ResponseJudge({})


def test_the_module_is_importable_without_nemo_rl_and_says_what_is_missing() -> None:
    code = """
import sys
sys.modules["ray"] = None
import mopd_nemo.engines.nemo.environments as environments
assert "nemo_rl" not in sys.modules and not hasattr(environments, "VerifierEnvironment")
environments.register_environments()
"""
    environment = {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "UserError: nemo_rl is not importable: put a NeMo-RL checkout on PYTHONPATH" in answer.stderr


@pytest.mark.skipif(cpu.nemo_rl_missing() is not None, reason=str(cpu.nemo_rl_missing()))
def test_the_actor_in_nemo_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get(cpu.SOURCE, "")]))  # of the actor
    cpu.prepare()
    import ray
    from nemo_rl.environments.utils import create_env

    there: Any = importlib.reload(environments)  # it has its actor where NeMo-RL can be imported
    assert "mopd_choice" in there.register_environments()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        env = create_env("mopd_choice", {"task": "choice"})
        result = ray.get(env.step.remote(LOGS, METADATA))
        assert result.rewards.tolist() == [1.0, 0.0, 0.0, 0.0] and result.terminateds.tolist() == [1.0] * 4
        assert result.answers == ["A", "B", None, None] and result.next_stop_strings == [None] * 4
        assert result.observations[0] == {"role": "environment", "content": "Environment: correct"}
        batch = {"rewards": result.rewards, "is_end": torch.tensor([1.0, 1.0, 1.0, 1.0])}
        _, metrics = ray.get(env.global_post_process_and_metrics.remote(batch))
        assert metrics["accuracy"] == 0.25
    finally:
        ray.shutdown()
