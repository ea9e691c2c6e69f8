"""Signs in rows that a run could have written: none where problems merely vary, all where it falls."""

import random
from typing import Any

import pytest

from mopd_nemo.chat import Chat
from mopd_nemo.run.guard import best_evaluation, errors_over_problems, missing_steps, remarks, signs
from tests.conftest import make_group

Rows = list[dict[str, Any]]


def run(levels: list[float], seed: int, **changes: list[float]) -> Rows:
    """A row for each level of success, over six problems of very different difficulty with eight rollouts each."""
    rng = random.Random(seed)
    rows = []
    for step, level in enumerate(levels, start=1):
        chances = [min(max(rng.gauss(level, 0.3), 0.0), 1.0) for _ in range(6)]
        rates = [sum(rng.random() < chance for _ in range(8)) / 8 for chance in chances]
        mean = sum(rates) / 6
        error = (sum((rate - mean) ** 2 for rate in rates) / 5 / 6) ** 0.5
        rows.append({"step": step, "success_rate": mean, "guard/success_error": error})
        rows[-1] |= {"response/unfinished": 0.02, "guard/unfinished_error": 0.02, "student/entropy": 0.3}
        rows[-1] |= {name.replace("_", "/"): values[step - 1] for name, values in changes.items()}
    return rows


def alarm_step(rows: Rows, evaluations: Rows | None = None) -> int | None:
    for number in range(1, len(rows) + 1):
        if signs(rows[:number], evaluations or []).alarm:
            return rows[number - 1]["step"]
    return None


@pytest.mark.parametrize("levels", [[0.5] * 40, [0.3 + 0.01 * step for step in range(40)]], ids=["level", "rising"])
def test_problems_that_vary_raise_no_alarm(levels: list[float]) -> None:
    alarms = [seed for seed in range(40) if alarm_step(run(levels, seed)) is not None]
    assert len(alarms) <= 4  # one in ten runs of 40 steps


def test_a_fall_of_success_is_found_and_the_good_step_is_before_it() -> None:
    levels = [0.6] * 8 + [0.1] * 8
    found = [alarm_step(run(levels, seed)) for seed in range(20)]
    assert sum(step is not None and 8 < step <= 14 for step in found) >= 18
    last = signs(run(levels, seed=0))
    assert last.alarm and last.good_step is not None and last.good_step <= 9
    assert last.reasons[0].startswith("success of rollouts fell from") and "(steps 14 to 16)" in last.reasons[0]


def test_one_likely_sign_is_a_doubt_and_two_are_an_alarm() -> None:
    rising = [0.2] * 6 + [0.3, 0.4, 0.5]
    cut = [0.0] * 6 + [0.1, 0.15, 0.2]
    alone = signs(run([0.5] * 9, 3, student_entropy=rising))
    assert (
        not alone.alarm
        and alone.doubt
        and alone.reasons == ("the student's entropy is 2.0 times that of the first steps",)
    )
    both = signs(run([0.5] * 9, 3, student_entropy=rising, response_unfinished=cut))
    assert both.alarm and len(both.reasons) == 2 and both.metrics["guard/alarm"] == 1.0


def test_a_flat_teacher_is_a_sign_only_when_every_step_shows_it() -> None:
    flat = signs(run([0.5] * 9, 3, teacher_entropy=[0.25] * 6 + [0.31] * 3))
    assert flat.reasons == ("the teacher has been flatter than the student for 3 steps",) and not flat.alarm
    assert signs(run([0.5] * 9, 3, teacher_entropy=[0.25] * 7 + [0.31] * 2)).reasons == ()


def test_an_evaluation_clearly_below_the_best_one_is_an_alarm_by_itself() -> None:
    def evaluation(step: int, mean: float, change: float = 0.0) -> dict[str, Any]:
        row = {"step": step, "mean@8": mean, "num_problems": 20.0, "change/from": 4.0, "change": change}
        return row | {"change/low": change - 0.08, "change/high": change + 0.08}

    rows = run([0.5] * 9, 3)
    before = [evaluation(0, 0.4), evaluation(4, 0.5)]
    fell = signs(rows, [*before, evaluation(8, 0.38, -0.12)])
    assert fell.alarm and fell.reasons == ("held-out mean@8 fell from 50% (step 4) to 38% (step 8)",)
    assert fell.good_step is not None and fell.good_step <= 4
    assert not signs(rows, [*before, evaluation(8, 0.42, -0.08)]).alarm  # its interval touches 0
    few = [row | {"num_problems": 7.0} for row in (*before, evaluation(8, 0.38, -0.12))]
    assert not signs(rows, few).alarm
    assert best_evaluation([evaluation(0, 0.4), evaluation(4, 0.5), evaluation(8, 0.5)])["step"] == 4  # type: ignore[index]


def test_rows_without_what_is_needed_are_no_ground_for_alarm() -> None:
    assert signs([]).metrics == {"guard/alarm": 0.0}
    old = [{"step": step, "success_rate": 1.0 - step / 20} for step in range(1, 20)]
    assert not signs(old).alarm


def test_errors_are_over_problems(chat: Chat) -> None:
    groups = [make_group(chat, [("a", 1.0), ("b", 1.0)]), make_group(chat, [("a", 0.0), ("b", 1.0), ("c", None)])]
    found = errors_over_problems(groups)
    assert found == {"guard/success_error": pytest.approx(0.25), "guard/unfinished_error": 0.0}


def idle(steps: int, **metrics: float) -> Rows:
    metrics = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return [{"step": 1, "signal": 0.5}] + [{"step": s, "signal": 0.0, **metrics} for s in range(2, steps + 2)]


def test_steps_that_teach_nothing_are_said_after_five_and_after_each_doubling() -> None:
    rows = idle(45, group_all_failed=1.0)
    assert [n - 1 for n in range(1, len(rows) + 1) if remarks(rows[:n])] == [5, 10, 20, 40]
    assert remarks(rows[:6]) == [
        "nothing was learned in the last 5 steps: no rollout succeeds. Easier problems or a stronger model are needed; "
        "look at one with `mopd inspect`"
    ]
    assert remarks([*rows[:5], {"step": 6, "signal": 0.1}]) == [] == remarks([])


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        ({"group_all_succeeded": 1.0}, "every rollout succeeds"),
        ({"group_all_failed": 0.5}, "no rollout had a teacher or an advantage"),
        ({}, "no rollout had a teacher or an advantage"),
    ],
)
def test_the_reason_is_that_of_the_groups(metrics: dict[str, float], reason: str) -> None:
    assert reason in remarks(idle(5, **metrics))[0]


def test_updates_that_are_all_skipped_are_said() -> None:
    rows: Rows = [{"step": step, "signal": 1.0, "update/skipped": 1.0} for step in range(1, 6)]
    assert "updates of the last 5 steps were skipped" in remarks(rows)[0] and remarks(rows[:4]) == []


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        ("context/cut", "raise peers.max_peer_tokens"),
        ("context/overflow", "raise peers.max_context_tokens"),
        ("response/unfinished", "raise rollout.max_response_tokens"),
        ("outcome/verifier_error", "`mopd inspect` shows"),
    ],
)
def test_a_teacher_that_reads_fragments_is_said_once(metric: str, remedy: str) -> None:
    rows: Rows = [{"step": step, "signal": 1.0, metric: share} for step, share in enumerate([0.5, 0.95, 1.0], start=1)]
    assert remarks(rows[:1]) == [] == remarks(rows)
    assert remedy in remarks(rows[:2])[0] and "(95% in this step)" in remarks(rows[:2])[0]


def test_missing_rows_are_counted_in_words() -> None:
    rows: Rows = [{"step": step} for step in (4, 5, 7)]
    assert missing_steps(rows, range(1, 10)) == "1 to 3, 6, 8 to 9"
    assert missing_steps(rows, (4, 5)) == "" == missing_steps([], ())
    assert missing_steps([], range(0, 20, 5)) == "0 to 15"


def test_a_step_that_waits_for_the_cores_is_said_once() -> None:
    def step(number: int, lasted: float, cpu: float, reward: float = 0.0) -> dict[str, float]:
        return {"step": number, "signal": 1.0, "seconds/step": lasted, "seconds/cpu": cpu, "seconds/reward": reward}

    rows = [
        step(1, 4.0, 0.5),
        step(2, 40.0, 20.0),
        step(3, 40.0, 9.0, reward=20.0),
        step(4, 40.0, 9.0),
        step(5, 60.0, 9.0),
    ]
    assert [remarks(rows[:n], computes_here=True) for n in (1, 2, 3, 5)] == [[], [], [], []]
    (said,) = remarks(rows[:4], computes_here=True)
    assert said.startswith("this step took 40 s, in which its process computed for 9 s: other programs have the cores")
    assert remarks(rows[:4]) == []  # on a cluster, others compute
