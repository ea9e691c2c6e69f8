from pathlib import Path

import pytest

from bench import answer_recovery
from mopd_nemo.analysis.teacher_signal.conditions import LABELS
from mopd_nemo.chat import Chat
from mopd_nemo.files import write_rows
from mopd_nemo.run.rollouts import rollout_records
from tests.conftest import make_group


def test_every_condition_is_answered(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = [(f"{n}\n\\boxed{{2}}", 1.0) for n in range(4)], [(f"{n}\n\\boxed{{3}}", 0.0) for n in range(3)]
    file = tmp_path / "rollouts.jsonl"
    write_rows(file, rollout_records(0, [make_group(chat, [*right, *wrong])], None, chat))
    monkeypatch.setattr(answer_recovery, "SAMPLES", 2)
    answer_recovery.main(file, "embedded:arithmetic")
    found = dict(zip(LABELS.values(), capsys.readouterr().out.splitlines(), strict=True))
    other_problems = LABELS["unrelated_prompt"]
    for label, line in found.items():
        assert line.startswith(label) and line.endswith("of 0" if label == other_problems else "of 2"), line
