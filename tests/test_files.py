import json
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from mopd_nemo.files import append_row, explain, read_models, read_rows, replacing, write_json, write_rows


def test_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_row(file, {"step": 1})
    append_row(file, {"step": 2, "text": "ümlaut"})
    with file.open("a") as out:
        out.write('{"step": 3, "te')
    assert read_rows(file) == [{"step": 1}, {"step": 2, "text": "ümlaut"}]


def test_what_fails_halfway_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    write_json(file, {"a": 1})
    with pytest.raises(RuntimeError), replacing(file) as out:
        out.write('{"a": 2')
        raise RuntimeError
    assert json.loads(file.read_text()) == {"a": 1}
    write_rows(file, [{"a": 2}])
    assert read_rows(file) == [{"a": 2}]


class Row(BaseModel):
    id: int


def test_each_line_of_a_person_s_file_is_a_row_or_an_error_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n\n{"id": "x"}\n{"id": 4}')
    (one, _, first), (three, text, error), (four, _, last) = read_models(file, Row)
    assert (one, three, four) == (1, 3, 4) and (first, last) == (Row(id=1), Row(id=4)) and text == '{"id": "x"}\n'
    assert isinstance(error, ValidationError) and explain(error).startswith("id: Input should be a valid integer")
