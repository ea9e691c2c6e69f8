"""Judging in parallel: order, deadlines, deaths, and what is left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import CodeConfig, FeedbackConfig, MathConfig, VerifierConfig
from mopd_nemo.types import Message, Outcome, Problem, Rollout, Verdict
from mopd_nemo.verifiers import TASKS, verifier_class
from mopd_nemo.verifiers.base import decide
from mopd_nemo.verifiers.pool import PendingVerdicts, VerifierPool
from mopd_nemo.verifiers.sandbox.layers import LayerName

ENDLESS = r"\boxed{9^{9^{9^{9^{9}}}}}"
"""math-verify does not finish with it, and does not react to a request to stop."""


def config(layer: LayerName, workers: int = 2, seconds: float = 1.0) -> VerifierConfig:
    return VerifierConfig(
        workers=workers,
        math=MathConfig(seconds_per_answer=seconds),
        code=CodeConfig(sandbox=layer, seconds_per_test=2.0, memory_mb=256),
    )


@pytest.fixture(scope="module")
def pool(best_layer: LayerName):
    with VerifierPool(config(best_layer), list(TASKS)) as pool:
        yield pool


def rollout(text: str, finished: bool = True) -> Rollout:
    return Rollout((1,), text, finished, (0.0,))


def problem(task: str, answer: object) -> Problem:
    return Problem("p", (Message(role="user", content="?"),), answer, task)


def judge_all(pool: VerifierPool, of: Problem, texts: list[str]) -> list[Verdict]:
    return [future.result() for future in [pool.submit(of.task, text, of.answer) for text in texts]]


def program(source: str) -> str:
    return f"```python\n{source}\n```"


def test_verdicts_come_in_the_order_of_the_rollouts(pool: VerifierPool) -> None:
    answer = {"inputs": ["1"], "outputs": ["1"]}
    texts = [program(f"import time\ntime.sleep({0.3 if n % 3 == 0 else 0})\nprint({n % 2})") for n in range(8)]
    verdicts = judge_all(pool, problem("code", answer), texts)
    assert [verdict.reward for verdict in verdicts] == [0.0, 1.0] * 4
    assert all(verdict.seconds > 0.2 for verdict in verdicts[::3])


def test_tasks_of_every_kind_share_a_pool(pool: VerifierPool) -> None:
    futures = [
        pool.submit("math", r"\boxed{\frac{1}{2}}", "0.5"),
        pool.submit("choice", "<answer>A</answer>", "A"),
        pool.submit("tool", "Action: f\nAction Input: {}", '[{"Action": "f", "Action_Input": "{}"}]'),
        pool.submit("code", program("print(1)"), {"inputs": [""], "outputs": ["1"]}),
        pool.submit("arithmetic", r"\boxed{3}", "3"),
    ]
    assert [future.result().outcome for future in futures] == [Outcome.CORRECT] * 5


def test_an_undecided_answer_is_wrong_and_disturbs_nobody(pool: VerifierPool) -> None:
    started = time.monotonic()
    answers = [ENDLESS, r"\boxed{4}", ENDLESS, r"\boxed{5}"]
    verdicts = judge_all(pool, problem("math", "4"), answers)
    assert [v.outcome for v in verdicts] == [
        Outcome.WRONG, Outcome.CORRECT, Outcome.WRONG, Outcome.WRONG,
    ]  # fmt: skip
    assert "not decided within 1 s" in verdicts[0].details["undecided"]
    assert [v.success for v in verdicts] == [False, True, False, False]
    assert [v.informative for v in verdicts] == [False, True, False, False], "and so say workers"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("task", "answer"), [("math", ""), ("choice", "Paris"), ("tool", "[]"), ("code", {"inputs": []})]
)
def test_a_bad_gold_answer_is_a_verifier_error(pool: VerifierPool, task: str, answer: object) -> None:
    response = r"<answer>A</answer> \boxed{1}" + program("print(1)") + "\nAction: f\nAction Input: {}"
    verdict = pool.submit(task, response, answer).result()
    assert verdict.outcome is Outcome.VERIFIER_ERROR
    assert verdict.feedback == "" and "answer" in verdict.details["error"]


def test_a_killed_worker_is_replaced_and_its_response_judged_again(best_layer: LayerName) -> None:
    with VerifierPool(config(best_layer, workers=1), ["code"]) as pool:
        slow = pool.submit("code", program("import time\ntime.sleep(1)\nprint(1)"), {"inputs": [""], "outputs": ["1"]})
        time.sleep(0.5)
        process = pool._workers[0]._process
        assert process is not None
        os.killpg(process.pid, signal.SIGKILL)
        assert slow.result().outcome is Outcome.CORRECT


@pytest.mark.parametrize("gold", ["9^{9^{9^{9^{9}}}}", r"\sum_{k=1}^{10^{12}} \sin(k^{k})"])
def test_a_gold_answer_that_cannot_be_compared_is_a_verifier_error_whatever_the_response(
    pool: VerifierPool, gold: str
) -> None:
    assert "cannot be compared" in pool.gold_fault("math", gold).result()
    started = time.monotonic()
    verdict = pool.submit("math", r"\boxed{\frac{\pi}{4}}", gold).result()
    assert verdict.outcome is Outcome.VERIFIER_ERROR and verdict.success is None
    assert "cannot be compared" in verdict.details["error"] and repr(gold) in verdict.details["error"]
    assert time.monotonic() - started < 5  # its fault is known


def test_sound_gold_answers_have_no_fault(pool: VerifierPool) -> None:
    golds = [5, "12:30", "1:0", r"\frac{1}{0}", "x \\ne 3", r"\$5", r"\begin{cases}1&x>0\\0&x\le 0\end{cases}", "ABC"]
    assert [pool.gold_fault("math", gold).result() for gold in golds] == [""] * len(golds)
    assert pool.gold_fault("choice", "A").result() == ""


def test_votes_are_counted_by_the_verifiers_own_equality(pool: VerifierPool) -> None:
    assert pool.same("math", r"\frac12", "0.5").result() and not pool.same("math", "0.5", "0.6").result()
    assert pool.same("choice", "A", "A").result() and not pool.same("choice", "A", "B").result()
    assert not pool.same("math", ENDLESS.removeprefix(r"\boxed{")[:-1], "9^{9}").result()


def test_a_response_that_kills_its_worker_twice_is_a_verifier_error(best_layer: LayerName) -> None:
    with VerifierPool(config(best_layer, workers=1), ["math"]) as pool:
        worker = pool._workers[0]
        ask = worker._ask

        def die_first(request: tuple[bytes, bytes], seconds: float) -> dict[str, object]:
            assert worker._process is not None
            worker._process.kill()
            worker._process.wait()
            return ask(request, seconds)

        worker._ask = die_first  # type: ignore[method-assign]
        verdict = pool.submit("math", r"\boxed{1}", "1").result()
        assert verdict.outcome is Outcome.VERIFIER_ERROR and "ended" in verdict.details["error"]
        worker._ask = ask  # type: ignore[method-assign]
        assert pool.submit("math", r"\boxed{1}", "1").result().outcome is Outcome.CORRECT


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def test_closing_leaves_no_process_and_loses_no_time(best_layer: LayerName) -> None:
    before = children(os.getpid())
    pool = VerifierPool(config(best_layer, seconds=60.0), ["math", "code"])
    futures = [pool.submit("math", ENDLESS, "4") for _ in range(4)]
    time.sleep(0.3)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    assert children(os.getpid()) <= before
    assert all(future.cancelled() or future.result().outcome is Outcome.VERIFIER_ERROR for future in futures)


def test_killing_the_parent_leaves_no_process(best_layer: LayerName) -> None:
    source = f"""
import sys, time
from mopd_nemo.config.verifiers import CodeConfig, MathConfig, VerifierConfig
from mopd_nemo.verifiers.pool import VerifierPool
config = VerifierConfig(
    workers=2, math=MathConfig(seconds_per_answer=60), code=CodeConfig(sandbox={best_layer!r}, seconds_per_test=60)
)
pool = VerifierPool(config, ["math", "code"])
pool.submit("math", {ENDLESS!r}, "4")
pool.submit("code", "```\\nwhile True: pass\\n```", {{"inputs": [""], "outputs": [""]}})
time.sleep(1)
print(*[worker._process.pid for worker in pool._workers], flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    deadline = time.monotonic() + 30
    while len(below := set(workers).union(*(children(pid) for pid in workers))) <= 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(below) > 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]


def test_verifiers_that_cannot_start_are_an_error_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "latex2sympy2_extended.py").write_text("raise ImportError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match="broken installation"):
        VerifierPool(VerifierConfig(workers=1), ["math"])


def test_string_tasks_need_no_process() -> None:
    with VerifierPool(VerifierConfig(), ["choice", "tool", "arithmetic"]) as pool:
        assert not pool._workers
        assert pool.submit("choice", "<answer>A</answer>", "A").done()


def test_rollouts_may_be_added_as_they_finish(pool: VerifierPool) -> None:
    samples = [[rollout(r"\boxed{1}"), rollout(r"\boxed{2}")], [rollout("cut", finished=False), rollout(r"\boxed{2}")]]
    problems = [replace(problem("math", "1"), id="a"), replace(problem("math", "2"), id="b")]
    verifying = PendingVerdicts(pool, None)
    verifying.add(problems[1], 1, samples[1][1])
    verifying.add(problems[0], 0, samples[0][0])
    outcomes = [[verdict.outcome for verdict in verdicts] for verdicts in verifying.collect(problems, samples)]
    assert outcomes == [[Outcome.CORRECT, Outcome.WRONG], [Outcome.TRUNCATED, Outcome.CORRECT]]


@pytest.mark.parametrize(("reward", "success"), [(0.0, False), (0.4, False), (0.5, True), (1.0, True)])
def test_a_graded_reward_is_a_success_from_the_threshold_on(reward: float, success: bool) -> None:
    assert decide(Verdict(reward, Outcome.WRONG), threshold=0.5).success is success


def test_success_is_decided_in_workers_and_in_place_alike(pool: VerifierPool) -> None:
    for task, answer, texts in (
        ("math", "1", [r"\boxed{1}", r"\boxed{2}"]),
        ("choice", "A", ["<answer>A</answer>", "B"]),
    ):
        verdicts = judge_all(pool, problem(task, answer), texts)
        assert [verdict.success for verdict in verdicts] == [True, False]
    (undecided,) = judge_all(pool, problem("choice", "Paris"), ["B"])
    assert undecided.success is None and decide(undecided, threshold=0.0).success is None


def test_a_batch_says_how_many_could_not_be_judged(pool: VerifierPool, caplog: pytest.LogCaptureFixture) -> None:
    of = problem("choice", "Paris")
    PendingVerdicts(pool, None).collect([of], [[rollout("<answer>A</answer>"), rollout("B")]])
    assert "2 of 2 responses could not be judged; the first: AnswerError: answer='Paris'" in caplog.text


def test_feedback_holds_the_gold_answer_in_no_task_unless_asked(best_layer: LayerName) -> None:
    cases = {
        "math": (r"\boxed{7}", "123456"),
        "arithmetic": (r"\boxed{7}", "123456"),
        "tool": ("Action: f\nAction Input: {}", '[{"Action": "f", "Action_Input": "{\\"key\\": 123456}"}]'),
        "code": (program("print(7)"), {"inputs": [""], "outputs": ["123456"]}),
    }
    revealing = config(best_layer).model_copy(update={"feedback": FeedbackConfig(reveal_gold=True)})
    for task, (response, answer) in cases.items():
        for settings, shown in ((config(best_layer), False), (revealing, True)):
            verifier = verifier_class(task, settings)(settings)
            verdict = verifier.judge(response, answer, True)
            verifier.close()
            assert verdict.outcome is Outcome.WRONG and verdict.feedback
            assert ("123456" in verdict.feedback) is shown
