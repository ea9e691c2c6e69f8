"""Outputs that cannot be written are refused before any work, and leave nothing behind."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mopd_nemo.cli import app
from mopd_nemo.commands import check_output
from mopd_nemo.config import UserError
from tests.conftest import QUICKSTART


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A directory where root cannot write either."""
    path = tmp_path / "read-only"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(path)], check=False).returncode:
        pytest.skip("needs root and mount")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_what_can_be_written_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for path, directory in (("new/deep/file.json", False), ("new/deep", True), ("file", False), ("empty", True)):
        check_output(tmp_path / path, "--output", directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_what_cannot_is_named_with_the_reason(tmp_path: Path, read_only: Path) -> None:
    (tmp_path / "file").touch()
    for path, directory, reason in (
        (tmp_path / "file" / "x", False, "/file is no directory"),
        (tmp_path / "file", True, "a file is in its place; name a directory"),
        (tmp_path, False, "a directory is in its place; name a file"),
        (read_only / "x", False, "no permission to write in"),
        (read_only / "deep" / "x", True, "no permission to write in"),
        (read_only, True, "no permission to write in"),
    ):
        with pytest.raises(UserError, match=f"--output {path}: .*{reason}"):
            check_output(path, "--output", directory)


COMMANDS = {
    "eval": f"eval --config {QUICKSTART} model.path=/none --output OUT",
    "eval rollouts": f"eval --config {QUICKSTART} model.path=/none --rollouts OUT",
    "complete": f"complete --config {QUICKSTART} method=gkd teacher.kind=external teacher.path=/none --output OUT",
    "verify": "verify --task math --input IN --output OUT",
    "report": "report IN --output OUT",
    "compare": "compare IN --output OUT",
    "export": "export IN --output OUT",
    "prepare": "data prepare gsm8k --input IN --output OUT",
    "diversity": "analyze diversity a=IN --output OUT",
    "cases": "analyze cases a=IN b=IN --output OUT",
    "preflight": f"preflight --config {QUICKSTART} --problems 2 --output OUT",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_finds_out_first(name: str, tmp_path: Path, read_only: Path) -> None:
    (tmp_path / "in").write_text('{"id": 1, "response": "1", "answer": "1"}\n')
    words = COMMANDS[name].replace("IN", str(tmp_path / "in")).replace("OUT", str(read_only / "out"))
    done = CliRunner().invoke(app, words.split())
    assert isinstance(done.exception, UserError), done
    assert str(done.exception).startswith((f"--output {read_only}/out: ", f"--rollouts {read_only}/out: "))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "read-only"]
