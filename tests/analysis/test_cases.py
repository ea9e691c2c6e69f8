"""Two runs made by hand: who solves what, since when, and what the page shows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mopd_nemo.analysis.cases import write_cases
from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, PeersConfig, UserError
from mopd_nemo.files import write_rows
from mopd_nemo.peers.render import build_contexts
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.rollouts import rollout_records
from mopd_nemo.types import RolloutGroup
from tests.conftest import make_group

Responses = Mapping[str, Sequence[tuple[str, float]]]
S, F = ("7+5=2 \\boxed{2}", 1.0), ("7+5=3 <b>no</b>", 0.0)


def groups(chat: Chat, problems: Responses) -> list[RolloutGroup]:
    made = []
    for problem, responses in problems.items():
        group = make_group(chat, [(f"{text} {i}", reward) for i, (text, reward) in enumerate(responses)])
        object.__setattr__(group.problem, "id", problem)
        made.append(group)
    return made


def make_run(path: Path, chat: Chat, steps: Mapping[int, Responses], evals: Mapping[int, Responses]) -> RunDirectory:
    run = RunDirectory(path)
    run.create(Config())
    for step, problems in steps.items():
        step_groups = groups(chat, problems)
        contexts = build_contexts(step_groups, chat, PeersConfig(), f"{step}")
        write_rows(run.rollouts_file(step), rollout_records(step, step_groups, contexts, chat))
    for step, problems in evals.items():
        write_rows(run.rollouts_file(step, "eval"), rollout_records(step, groups(chat, problems), None, chat))
    return run


@pytest.fixture
def runs(chat: Chat, tmp_path: Path) -> dict[str, RunDirectory]:
    a = make_run(
        tmp_path / "a",
        chat,
        {1: {"late": [F, F], "both": [S, F]}, 2: {"late": [S, S, F], "a never": [F, F]}, 3: {"only a": [F, S, S, S]}},
        {0: {"h1": [F, F], "h2": [F, F]}, 4: {"h1": [S, S], "h2": [S, F]}},
    )
    b = make_run(
        tmp_path / "b",
        chat,
        {1: {"late": [S, F], "both": [S, S]}, 2: {"only a": [F, F], "a never": [S, F]}},
        {0: {"h1": [F, F], "h2": [F, F]}, 4: {"h1": [F, F], "h2": [S, S]}, 9: {"h1": [S, S]}},
    )
    return {"A": a, "B": b}


def test_who_solves_what_and_since_when(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    write_cases(runs, tmp_path / "out", {"no box": "^(?!.*boxed)"}, [], 8)
    data = json.loads((tmp_path / "out" / "cases.json").read_text())
    assert data["held_out"]["step"] == 4 and data["held_out"]["only"] == {"A": ["h1"], "B": ["h2"]}
    assert data["held_out"]["rates"]["h2"] == {"A": 0.5, "B": 1.0}
    training = data["training"]
    assert training["first_solved"] == {
        "late": {"A": 2, "B": 1},
        "both": {"A": 1, "B": 1},
        "a never": {"A": None, "B": 2},
        "only a": {"A": 3, "B": None},
    }
    assert training["only"] == {"A": ["only a"], "B": ["a never"]} and training["earlier"] == {"A": 1, "B": 2}
    assert [row["no box"] for row in data["patterns"]["A"]] == [0.75, 0.6, 0.25]


def test_the_page_sets_right_beside_wrong_with_what_the_teacher_read(
    runs: dict[str, RunDirectory], tmp_path: Path
) -> None:
    page, *others = write_cases(runs, tmp_path / "out", {"no box": "^(?!.*boxed)"}, ["both"], 8)
    text = page.read_text()
    assert "Only A (1 of 1 shown" in text and "Solved by B only (1 of 1 shown)" in text
    assert "<ins>" in text and "<del>" in text
    assert "A correct solution of this problem" in text and "no teacher read this group" in text
    assert "<b>no</b>" not in text, "model text is escaped"
    assert "Problems asked for" in text
    assert {path.suffix for path in others} == {".json", ".pdf", ".png"}


def test_another_evaluation_can_be_compared(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    write_cases(runs, tmp_path, {}, [], 8, step=0)
    assert json.loads((tmp_path / "cases.json").read_text())["held_out"]["only"] == {"A": [], "B": []}
    with pytest.raises(UserError, match="--step 9: both runs have evaluations at steps 0, 4"):
        write_cases(runs, tmp_path, {}, [], 8, step=9)


def test_training_alone_or_evaluation_alone_is_enough(chat: Chat, tmp_path: Path) -> None:
    empty = make_run(tmp_path / "empty", chat, {}, {})
    trained = [make_run(tmp_path / name, chat, {1: {"p": [S, F]}}, {}) for name in ("t1", "t2")]
    tested = [make_run(tmp_path / name, chat, {}, {0: {"p": [S, F]}}) for name in ("e1", "e2")]
    for pair in (trained, tested):
        page, *_ = write_cases(dict(zip("AB", pair, strict=True)), tmp_path / "out", {"x": "7"}, [], 8)
        assert "case studies" in page.read_text()
    with pytest.raises(UserError, match="neither an evaluation at the same step nor training rollouts"):
        write_cases({"A": trained[0], "B": empty}, tmp_path / "out", {}, [], 8)
    with pytest.raises(UserError, match="--problem q: not among the problems"):
        write_cases(dict(zip("AB", trained, strict=True)), tmp_path / "out", {}, ["q"], 8)
