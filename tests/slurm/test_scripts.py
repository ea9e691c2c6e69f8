"""Linters of what is not Python."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    {*ROOT.glob("mopd_nemo/slurm/scripts/*.sh"), *ROOT.glob("slurm/*.sh"), *ROOT.glob("recipes/**/*.sh")}
    | {*ROOT.glob("tests/integration/slurm/*.sh"), ROOT / ".ci" / "run"}
)


def linter(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[dev]'")
    return found


def test_scripts_are_shellcheck_clean() -> None:
    command = [linter("shellcheck"), "--external-sources", "--source-path=SCRIPTDIR", *map(str, SCRIPTS)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout


def test_dockerfiles_are_hadolint_clean() -> None:
    files = sorted(ROOT.glob("containers/*.Dockerfile"))
    assert len(files) == 2
    answer = subprocess.run([linter("hadolint"), *map(str, files)], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout
