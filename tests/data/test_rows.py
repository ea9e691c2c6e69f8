import json
import logging
from pathlib import Path

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.data.rows import BadRows, RowError, read_rows, text_field

ROWS = [{"a": 1}, {"a": 2}]


def test_json_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("\n " + json.dumps(ROWS, indent=1))
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    assert list(read_rows(tmp_path / "r.json", BadRows("stop"))) == [("row 1", ROWS[0]), ("row 2", ROWS[1])]
    assert list(read_rows(tmp_path / "r.jsonl", BadRows("stop"))) == [("line 1", ROWS[0]), ("line 2", ROWS[1])]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "r.parquet")
    assert list(read_rows(tmp_path / "r.parquet", BadRows("stop"))) == [("row 1", ROWS[0]), ("row 2", ROWS[1])]
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(UserError, match=r"bad.parquet: not readable as parquet"):
        list(read_rows(tmp_path / "bad.parquet", BadRows("stop")))


def test_a_bad_row_stops_or_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"a": \n[1]\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"r.jsonl, line 2: not valid JSON.*data.on_bad_row=skip"):
        list(read_rows(path, BadRows("stop")))
    bad = BadRows("skip")
    with caplog.at_level(logging.WARNING):
        assert [row for _, row in read_rows(path, bad)] == ROWS
    assert bad.skipped[str(path)] == 2
    assert "line 3: not a JSON object; the row is left out" in caplog.text


def test_a_file_that_is_no_json_at_all(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("[1, ")
    with pytest.raises(UserError, match="not valid JSON"):
        list(read_rows(tmp_path / "r.json", BadRows("skip")))


@pytest.mark.parametrize("value", [None, 3, "", "  "])
def test_text_fields_name_themselves(value: object) -> None:
    with pytest.raises(RowError, match=r"^q: "):
        text_field({"q": value}, "q")
