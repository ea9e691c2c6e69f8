"""Rollout files: written by a run, read back by analyses as the pipeline saw the groups."""

from pathlib import Path

import pytest

from mopd_nemo.analysis.report import write_report
from mopd_nemo.chat import Chat
from mopd_nemo.commands.inspect import inspect
from mopd_nemo.config import UserError
from mopd_nemo.files import DamagedError, read_rows, write_rows
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.rollouts import (
    RecordedGroup,
    find_rollouts,
    group_at,
    read_groups,
    rollout_records,
    to_rollout_group,
)
from mopd_nemo.types import RolloutGroup
from tests.conftest import make_group
from tests.test_trainer import new_run

RESPONSES = [("7+5=2\n\\boxed{2}", 1.0), ("\\boxed{3}", 0.0), ("?", None)]


def groups(chat: Chat) -> list[RolloutGroup]:
    made = []
    for number in range(2):
        group = make_group(chat, RESPONSES, feedback="Wrong.")
        object.__setattr__(group.problem, "id", f"p{number}")
        made.append(group)
    return made


@pytest.fixture
def rollouts(chat: Chat, tmp_path: Path) -> Path:
    file = tmp_path / "rollouts.jsonl"
    write_rows(file, rollout_records(0, groups(chat), None, chat))
    return file


def tampered(rollouts: Path, **changes: object) -> list[RecordedGroup]:
    rows = read_rows(rollouts)
    for name, value in changes.items():
        rows[0].pop(name) if value is None else rows[0].update({name: value})
    write_rows(rollouts, rows)
    return read_groups(rollouts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"response_ids": None}, "lack 'response_ids'"),
        ({"messages": None}, "lack 'messages'"),
        ({"response_ids": [5, 6]}, "do not decode to its text"),
        ({"prompt": "another"}, "chat template renders the prompt of 0/p0 differently"),
    ],
)
def test_rollouts_of_another_model_family_are_refused(
    changes: dict[str, object], message: str, rollouts: Path, chat: Chat
) -> None:
    with pytest.raises(UserError, match=message):
        to_rollout_group(tampered(rollouts, **changes)[0], chat, rollouts)


def test_groups_come_back_as_they_were(rollouts: Path, chat: Chat) -> None:
    for recorded, group in zip(read_groups(rollouts), groups(chat), strict=True):
        assert (recorded.key, recorded.problem_id) == (f"0/{group.problem.id}", group.problem.id)
        rebuilt = to_rollout_group(recorded, chat, rollouts)
        assert rebuilt.problem == group.problem and rebuilt.verdicts == group.verdicts
        assert [r.response_ids for r in rebuilt.rollouts] == [r.response_ids for r in group.rollouts]


def test_a_run_stands_for_its_newest_evaluation_else_its_newest_step(rollouts: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.rollouts.mkdir(parents=True)
    with pytest.raises(UserError, match="neither a rollouts file"):
        find_rollouts(run.path)
    for step in (2, 10):
        run.rollouts_file(step).write_bytes(rollouts.read_bytes())
    assert find_rollouts(run.path) == run.rollouts_file(10) and list(run.rollout_files()) == [2, 10]
    run.rollouts_file(0, "eval").write_bytes(rollouts.read_bytes())
    assert find_rollouts(run.path) == run.rollouts_file(0, "eval") and find_rollouts(rollouts) == rollouts
    assert group_at(run, 0, "p1", "eval").problem_id == "p1"


def test_files_that_no_run_recorded_are_refused(rollouts: Path) -> None:
    rows = read_rows(rollouts)
    for broken, message in (
        ([], "no rollouts in it"),
        ([{"step": 0}], "row 1 lacks problem, rollout, response"),
        ([*rows, rows[0]], "the rollouts of 0/p0 are not in one block"),
    ):
        write_rows(rollouts, broken)
        with pytest.raises(UserError, match=message):
            read_groups(rollouts)
    rollouts.write_text("no json\n")
    with pytest.raises(DamagedError, match=r"rollouts.jsonl, line 1: not JSON Lines"):
        read_groups(rollouts)


def test_rows_that_a_page_cannot_show_name_their_file(tmp_path: Path) -> None:
    """Versions before 0.3 wrote no sources."""
    run = new_run(tmp_path / "run", "train.num_steps=1")
    file = run.rollouts_file(1)
    write_rows(file, [{k: v for k, v in row.items() if k != "sources"} for row in read_rows(file)])
    message = rf"{file}: row 1 lacks sources; give .* this version of `mopd` wrote, or move this one out of its run"
    for show in (lambda: write_report([run]), lambda: inspect(run.path)):
        with pytest.raises(UserError, match=message):
            show()
    assert len(read_groups(file)) == 4, "figures of responses need none"
