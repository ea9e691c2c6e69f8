"""Answer recovery on recorded rollouts: which problems count, what is read, and the figures by hand."""

from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS
from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.files import write_rows
from mopd_nemo.preflight.recovery import recovery_cases, recovery_figures
from mopd_nemo.run.rollouts import read_groups, rollout_records
from tests.conftest import make_group

RIGHT, WRONG = [(f"{n}\n\\boxed{{2}}", 1.0) for n in range(4)], [(f"{n}\n\\boxed{{3}}", 0.0) for n in range(3)]


def test_problems_with_every_condition_count(chat: Chat, settings: Config, tmp_path: Path) -> None:
    groups = [make_group(chat, [*RIGHT, *WRONG]), make_group(chat, RIGHT), make_group(chat, [*WRONG, *RIGHT])]
    for number, group in enumerate(groups):
        object.__setattr__(group.problem, "id", f"p{number}")
    file = tmp_path / "rollouts.jsonl"
    write_rows(file, rollout_records(0, groups, None, chat))
    cases = recovery_cases(read_groups(file), file, chat, settings)
    assert [case.group.problem.id for case in cases] == ["p0", "p2"]  # p1 has no failure to show
    for case in cases:
        assert set(case.contexts) == set(CONDITIONS)
        assert case.contexts["none"][0].prompt_ids == case.group.problem.prompt_ids
        kinds = [peer.kind for peer in case.contexts["2S+1F"][0].selection.peers]
        assert kinds == ["success", "success", "failure"]
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (case.group.problem.id, name): {"success": [name != "none", case is cases[0], None]}
        for case in cases
        for name in CONDITIONS
    }
    found = recovery_figures(cases, rows, 3)
    assert (found["num_problems"], found["num_groups"]) == (2, 3)
    assert found["conditions"]["none"]["right"]["mean"] == pytest.approx(0.25)
    assert found["conditions"]["1S"]["gain"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "num": 2}
