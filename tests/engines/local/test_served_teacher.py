"""A served teacher through the whole local engine, beside the same model in this process."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mopd_nemo.config import TeacherError, UserError
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.methods.opd import divergence_objective
from mopd_nemo.types import TrainExample
from tests.conftest import make_random_model
from tests.engines.local.test_learner import TEACHER_PROMPTS, learn, make_batch, make_rows
from tests.engines.scripted_server import ScriptedServer

Make = Callable[..., LocalEngine]
SUPPORTS = {
    "teacher_topk": ["divergence.support=teacher_topk", "divergence.k=20"],
    "no tail": ["divergence.support=teacher_topk", "divergence.k=20", "divergence.tail=false"],
    "reverse": ["divergence.support=teacher_topk", "divergence.k=20", "divergence.kind=reverse_kl"],
    "sampled": ["divergence.support=sampled", "divergence.kind=reverse_kl"],
}

pytestmark = pytest.mark.usefixtures("no_waits")


def gradients(engine: LocalEngine, rows: list[TrainExample]) -> tuple[float, dict[str, Any]]:
    """Loss and gradient of an update."""
    found: dict[str, Any] = {}

    def keep(*_: object) -> dict[str, float]:
        found.update((name, p.grad) for name, p in engine.student.named_parameters().items())
        return {}

    engine._learner._apply = keep
    return learn(engine, rows, 1e-3)["loss"], found


def check_equal(*engines: LocalEngine) -> None:
    """Loss and gradient of several engines, to 1e-5; of a gradient, of its largest entry."""
    rows = make_rows(engines[0], TEACHER_PROMPTS)
    (loss, expected), *others = [gradients(engine, rows) for engine in engines]
    largest = max(value.abs().max().item() for value in expected.values())
    assert abs(loss) > 1e-2 and largest > 1e-3
    for other_loss, found in others:
        assert other_loss == pytest.approx(loss, abs=1e-5, rel=0)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_served_teacher_teaches_as_the_same_model_in_this_process(
    make: Make, teacher_model: Path, server: ScriptedServer, support: str
) -> None:
    here = make("teacher.kind=external", f"teacher.path={teacher_model}", *SUPPORTS[support])
    there = make("teacher.kind=server", f"teacher.urls=[{server.url}]", *SUPPORTS[support])
    check_equal(here, there)


def test_a_row_shifted_by_one_token_is_caught(make: Make, server: ScriptedServer) -> None:
    engine = make("teacher.kind=server", f"teacher.urls=[{server.url}]", *SUPPORTS["teacher_topk"])
    rows = make_rows(engine, TEACHER_PROMPTS)

    def shift(answer: dict) -> None:
        positions = answer["choices"][0]["prompt_logprobs"]
        positions[1:] = [*positions[2:], positions[1]]

    server.spoil = shift
    with pytest.raises(TeacherError, match=rf"{server.url} cannot be used: token .* has no log-probability of token"):
        learn(engine, rows, 1e-3)


@pytest.mark.parametrize("support", ["teacher_topk", "sampled"])
def test_what_the_teacher_says_of_the_sampled_tokens_is_in_the_metrics(
    make: Make, teacher_model: Path, server: ScriptedServer, support: str
) -> None:
    here = make("teacher.kind=external", f"teacher.path={teacher_model}", *SUPPORTS[support])
    there = make("teacher.kind=server", f"teacher.urls=[{server.url}]", *SUPPORTS[support])
    rows = make_rows(here, TEACHER_PROMPTS)
    expected, found = learn(here, rows, 0.0), learn(there, rows, 0.0)
    names = {"teacher/advantage", "student/entropy", "sampler/gap"} | (
        {"topk_overlap"} if support != "sampled" else set()
    )
    for name in names:
        assert found[name] == pytest.approx(expected[name], abs=1e-5), name
    assert not {"teacher/entropy", "teacher/topk_mass"} & found.keys()


def test_metrics_say_how_it_went(make: Make, server: ScriptedServer) -> None:
    engine = make("teacher.kind=server", f"teacher.urls=[{server.url}]", *SUPPORTS["teacher_topk"])
    rows = make_rows(engine, TEACHER_PROMPTS)
    server.statuses = [503, 429]
    metrics = learn(engine, rows, 1e-3)
    assert (metrics["score/retries"], metrics["score/replicas"]) == (2, 1)
    assert 0 <= metrics["topk_overlap"] <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "divergence.support=student_topk does not go with teacher.kind=server: a server tells the teacher's lik"),
        (["divergence.support=full"], "divergence.support=full does not go with teacher.kind=server"),
        (
            [*SUPPORTS["teacher_topk"], "divergence.contrast=0.5", "peers.failures=1", "peers.when_no_success=skip"],
            "divergence.contrast=0.5 asks",
        ),
        ([*SUPPORTS["teacher_topk"], "logging.save_token_signal_every=1"], "save_token_signal_every=1 needs"),
        (
            [*SUPPORTS["teacher_topk"], "teacher.urls=[http://u:hush@h:1]"],
            "teacher.urls: the one of h holds a password",
        ),
        ([*SUPPORTS["teacher_topk"], "teacher.urls=[host:8000]"], "'host:8000' is no address"),
        ([*SUPPORTS["teacher_topk"], "teacher.urls=[]"], "teacher.kind=server needs teacher.urls"),
        ([*SUPPORTS["teacher_topk"], "teacher.kind=frozen"], "is unused by teacher.kind=frozen"),
        ([*SUPPORTS["teacher_topk"], "method=dpo"], "teacher.kind=server does not go with method=dpo"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Make, settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        make("teacher.kind=server", "teacher.urls=[http://127.0.0.1:1]", *settings)
    assert message in str(refused.value) and "hush" not in str(refused.value)


# --- several teachers ------------------------------------------------------------------------------------------------


def rows_of(engine: LocalEngine, *teachers: str) -> list[TrainExample]:
    """Rows of four problems, which the teachers share in turn."""
    rows = make_rows(engine, TEACHER_PROMPTS)
    return [replace(row, teacher=teachers[row.group_index % len(teachers)]) for row in rows]


def loss_and_gradient(engine: LocalEngine, rows: list[TrainExample]) -> tuple[float, dict[str, Any], int]:
    return *gradients(engine, rows), sum(len(row.response_ids) for row in rows)


def several(**teachers: str) -> list[str]:
    return [f"teachers.{name}={{{block}}}" for name, block in teachers.items()]


@pytest.mark.parametrize("where", ["served", "external", "mixed"])
def test_every_row_is_taught_by_its_own_teacher(
    make: Make, teacher_model: Path, server: ScriptedServer, tmp_path: Path, where: str
) -> None:
    """Loss and gradient of one batch are the mean of those of each teacher alone on its rows."""
    third_model = make_random_model(tmp_path, seed=8)
    support = SUPPORTS["teacher_topk"]
    with ScriptedServer(third_model) as second:
        first = f"kind: external, path: {teacher_model}" if where != "served" else f"kind: server, urls: [{server.url}]"
        other = f"kind: external, path: {third_model}" if where == "external" else f"kind: server, urls: [{second.url}]"
        both = make(*several(one=first, other=other), *support)
        rows = rows_of(both, "one", "other")
        found, gradient, total = loss_and_gradient(both, rows)
        expected, parts = 0.0, []
        for name, path in (("one", teacher_model), ("other", third_model)):
            alone = make("teacher.kind=external", f"teacher.path={path}", *support)
            own = [replace(row, teacher="") for row in rows if row.teacher == name]
            loss, part, tokens = loss_and_gradient(alone, own)
            expected += loss * tokens / total
            parts.append({weight: value * tokens / total for weight, value in part.items()})
    assert found == pytest.approx(expected, abs=1e-5)
    for weight, value in gradient.items():
        torch.testing.assert_close(value, parts[0][weight] + parts[1][weight], atol=1e-7, rtol=1e-4)


def test_several_servers_are_asked_at_the_same_time(make: Make, server: ScriptedServer, second: ScriptedServer) -> None:
    blocks = {name: f"kind: server, urls: [{one.url}]" for name, one in (("one", server), ("other", second))}
    engine = make(*several(**blocks), *SUPPORTS["teacher_topk"])
    rows = rows_of(engine, *blocks)
    both, met = threading.Barrier(2, timeout=30), []
    for one in (server, second):
        first = iter([lambda: met.append(both.wait())])  # neither answers before the other is asked
        one.before = lambda first=first: next(first, lambda: None)()
    targets, metrics = engine.score(make_batch(rows, divergence_objective(engine._config.divergence)))
    assert all(target is not None and target.taught for target in targets) and metrics["score/replicas"] == 2
    assert sorted(met) == [0, 1]


def test_a_server_that_fails_stops_the_questions_to_the_others(
    make: Make, server: ScriptedServer, second: ScriptedServer
) -> None:
    blocks = {name: f"kind: server, urls: [{one.url}]" for name, one in (("one", server), ("other", second))}
    engine = make(
        *several(**{name: f"{block}, max_in_flight: 1" for name, block in blocks.items()}), *SUPPORTS["teacher_topk"]
    )
    rows = rows_of(engine, *blocks)
    second.asked.clear()
    second.slow = 0.2
    server.statuses = [400]
    with pytest.raises(TeacherError, match=server.url):
        engine.score(make_batch(rows * 8, divergence_objective(engine._config.divergence)))
    assert len(second.asked) < 4 * len(rows)


def test_signals_of_a_part_of_the_teachers_are_means_over_their_tokens(
    make: Make, teacher_model: Path, server: ScriptedServer
) -> None:
    here, there = f"kind: external, path: {teacher_model}", f"kind: server, urls: [{server.url}]"
    mixed = make(*several(here=here, there=there), *SUPPORTS["teacher_topk"])
    rows = rows_of(mixed, "here", "there")
    alone = make("teacher.kind=external", f"teacher.path={teacher_model}", *SUPPORTS["teacher_topk"])
    own = [replace(row, teacher="") for row in rows if row.teacher == "here"]
    expected = learn(alone, own, 0.0)["teacher/entropy"]
    metrics = learn(mixed, rows, 0.0)
    assert metrics["teacher/entropy"] == pytest.approx(expected, rel=1e-5)
    assert metrics["score/replicas"] == 1 and metrics["score/tokens"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teachers.a={kind: server}"], "teachers.a.urls"),
        (["teachers.a={kind: ema}"], "teachers.a.kind='ema'"),
        (["teachers.a={kind: frozen, pth: x}"], "unknown key teachers.a.pth; did you mean teachers.a.path?"),
        (["teachers.a={kind: frozen, ema_rate: 0.5}"], "teachers.a.ema_rate=0.5 is unused by kind=frozen"),
        (["teachers.a={kind: frozen, tasks: [math]}", "teachers.math={kind: frozen}"], "math is taught by teachers.a"),
        (["teachers.a={kind: frozen}", "teacher.kind=ema"], "teacher.kind=ema with 1 teachers"),
        (["teacher.kind=several"], "teacher.kind=several with 0 teachers"),
        (["teachers.a={kind: frozen}", "method=dpo"], "teacher.kind=several does not go with method=dpo"),
        (["teachers.a={kind: frozen}", "peers.choose=measured"], "teacher.kind=several is another model"),
        (["teachers.a={kind: server, urls: [http://127.0.0.1:1]}"], "divergence.support=student_topk does not go with"),
    ],
)
def test_blocks_of_several_teachers_that_cannot_work_are_refused(make: Make, settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        make(*settings)
    assert message in str(refused.value)
