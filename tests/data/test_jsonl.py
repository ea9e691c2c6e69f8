from pathlib import Path

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.data.jsonl import read_problems

GOOD = '{"id": 1, "prompt": "1+1?", "answer": 2, "task": "math"}'


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_prompt_and_messages_are_both_read(tmp_path: Path) -> None:
    chat = (
        '{"id": "b", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], '
        '"answer": "x", "task": "arithmetic"}'
    )
    first, second = read_problems(write(tmp_path / "p.jsonl", GOOD, "", chat), key="data.train")
    assert (first.id, first.messages) == ("1", ({"role": "user", "content": "1+1?"},))
    assert [m["role"] for m in second.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 2, "prompt": "x", "task": "math"}', "line 2: answer: Field required"),
        ('{"id": 2, "prompt": "x", "answer": 1, "task": "poetry"}', "line 2: task=poetry: choose arithmetic, choice"),
        ('{"id": 2, "answer": 1, "task": "math"}', "line 2: give exactly one of `prompt` and `messages`"),
        ('{"id": 2, "messages": [], "answer": 1, "task": "math"}', "line 2: `messages` must end with a user turn"),
        ("{", "line 2: Invalid JSON"),
        (GOOD, "line 2: id '1' appears twice"),
    ],
)
def test_bad_rows_are_named_by_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_problems(write(tmp_path / "p.jsonl", GOOD, line), key="data.train")


def test_empty_or_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.eval=.*: the file has no rows"):
        read_problems(write(tmp_path / "p.jsonl"), key="data.eval")
    with pytest.raises(UserError, match=r"data.eval=nowhere: no such file"):
        read_problems("nowhere", key="data.eval")
