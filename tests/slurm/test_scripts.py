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


def newest_checkpoint(run: Path) -> str:
    """What the batch script takes for the newest checkpoint of a run."""
    script = (ROOT / "mopd_nemo" / "slurm" / "scripts" / "batch.sh").read_text()
    function = script[script.index("newest_checkpoint() {") :].split("\n}\n")[0] + "\n}\nnewest_checkpoint"
    return subprocess.run(
        ["bash", "-c", function],
        capture_output=True,
        text=True,
        check=True,
        env={"MOPD_RUN_DIR": str(run), "PATH": "/bin:/usr/bin"},
    ).stdout.strip()


def test_the_batch_script_counts_the_run_s_own_checkpoints_and_tells_a_new_one_of_the_same_name(tmp_path: Path) -> None:
    """After a damaged checkpoint was passed over, the next one may have its name: that is progress."""
    assert newest_checkpoint(tmp_path) == ""
    for name in ("step_000004", "step_999999", "step_1000000", "step_best", "damaged-9999999", ".partial-9999999"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    before = newest_checkpoint(tmp_path)
    assert before.startswith("step_1000000, written ")
    shutil.rmtree(tmp_path / "checkpoints" / "step_1000000")
    (tmp_path / "checkpoints" / "step_1000000").mkdir()
    assert newest_checkpoint(tmp_path).startswith("step_1000000, written ") and newest_checkpoint(tmp_path) != before
