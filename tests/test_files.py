import gzip
import json
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from mopd_nemo.files import (
    DamagedError,
    WriteError,
    append_row,
    explain,
    in_bytes,
    read_models,
    read_rows,
    read_text,
    replacing,
    write_json,
    write_rows,
)


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


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (b"", 0),
        (b'{"step": 1}', 0),
        (b'{"step": 1}\n\0\0\0', 1),
        (b'{"step": 1}\n\0\0\n\xff\n', 1),
        (b'{"step": 1}\n[1]\n', 1),
    ],
)
def test_what_a_power_loss_left_at_the_end_is_left_out(text: bytes, rows: int, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(text)
    assert len(read_rows(tmp_path / "rows.jsonl")) == rows


@pytest.mark.parametrize("text", [b'{"a": 1}\n\0\n{"a": 2}\n', b"{\n{}\n", b"\n{}\n"])
def test_a_damaged_line_before_a_good_one_is_an_error(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(text)
    with pytest.raises(DamagedError, match=r"rows.jsonl, line [12]: damaged, with good rows after it"):
        read_rows(tmp_path / "rows.jsonl")


def test_what_is_no_jsonl_at_all_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DamagedError, match=r"rows.csv, line 1: not JSON Lines"):
        read_rows(tmp_path / "rows.csv")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", path], check=False).returncode:
        pytest.skip("needs root and mount")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_is_named_and_leaves_the_old_file(small_disk: Path) -> None:
    file = small_disk / "rows.jsonl"
    write_rows(file, [{"step": 1}])
    for write in (lambda: append_row(file, {"x": "y" * 70_000}), lambda: write_rows(file, [{"x": "y" * 70_000}])):
        with pytest.raises(WriteError, match=r"rows.jsonl: cannot be written: No space left on device; .*B are free"):
            write()
        assert file.read_text() == '{"step": 1}\n' and [path.name for path in small_disk.iterdir()] == ["rows.jsonl"]
    append_row(file, {"step": 2})
    assert read_rows(file) == [{"step": 1}, {"step": 2}]


def test_a_limit_of_file_sizes_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    append_row(file, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        for write in (lambda: append_row(file, {"x": "y" * 6000}), lambda: write_rows(file, [{"x": "y" * 6000}])):
            with pytest.raises(
                WriteError, match=r"would be larger than 5 kB, this process's limit: raise it \(ulimit -f\)"
            ):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text() == '{"step": 1}\n' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.23 MB"), (112e9, "112 GB"), (None, "any size")]
)
def test_sizes_are_read_easily(count: int | None, text: str) -> None:
    assert in_bytes(count) == text


class Row(BaseModel):
    id: int


def test_each_line_of_a_person_s_file_is_a_row_or_an_error_with_its_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n\n{"id": "x"}\n{"id": 4}')
    (one, _, first), (three, text, error), (four, _, last) = read_models(file, Row)
    assert (one, three, four) == (1, 3, 4) and (first, last) == (Row(id=1), Row(id=4)) and text == '{"id": "x"}\n'
    assert isinstance(error, ValidationError) and explain(error).startswith("id: must be a whole number")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1}\n{"id": "é"}'.encode("latin-1"), "line 2: not UTF-8 text (byte 0xe9)"),
        ('{"id": 1}'.encode("utf-16"), "UTF-16 text, not UTF-8"),
        (gzip.compress(b'{"id": 1}', mtime=0), "compressed with gzip, not UTF-8"),
        (b"PAR1\x15\x04", "a parquet file, not UTF-8"),
    ],
)
def test_what_is_not_utf_8_text_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(DamagedError, match=re.escape(f"{file}") + ".*" + re.escape(message)):
        list(read_models(file, Row))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n', encoding="utf-8-sig")
    assert [row for _, _, row in read_models(file, Row)] == [Row(id=1)] and read_text(file) == '{"id": 1}\n'


def test_broken_json_is_placed_in_its_own_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n{"id": \n')
    *_, (number, _, error) = read_models(file, Row)
    assert number == 2 and isinstance(error, ValidationError)
    assert explain(error) == "not valid JSON: EOF while parsing a value at column 6"
