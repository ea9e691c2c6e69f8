"""`mopd submit` with a fake `sbatch` on PATH; tests/integration/slurm has a real one."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mopd_nemo.cli import app
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from tests.conftest import QUICKSTART

FAKE = """#!/usr/bin/env bash
echo "$*" >> "$(dirname "$0")/calls"
echo 1$(wc -l < "$(dirname "$0")/calls")
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command lines that a fake sbatch was given."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "sbatch"
    program.write_text(FAKE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    site = tmp_path / "site.yaml"
    site.write_text(f"root: {tmp_path}/runs\naccount: research\n")
    monkeypatch.setenv("MOPD_SITE", str(site))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "bin" / "calls"


def submit(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, ["submit", "--config", str(QUICKSTART), *arguments], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result.stdout


def test_job_directory_holds_script_settings_and_code(calls: Path, tmp_path: Path) -> None:
    output = submit("--output", "out", "train.num_steps=7")
    job = tmp_path / "out" / "job"
    assert calls.read_text().split() == ["--parsable", str(job / "job.sbatch")]
    assert f"job 11: {job}/job.sbatch" in output
    assert load_config(job / "config.yaml").train.num_steps == 7
    assert (job / "code" / "mopd_nemo" / "slurm" / "scripts" / "batch.sh").exists()
    assert not list(job.rglob("__pycache__"))
    with pytest.raises(UserError, match=r"holds a job already; `sbatch .*job.sbatch` continues it"):
        submit("--output", "out")


def test_default_directory_is_in_the_site_s_root(calls: Path, tmp_path: Path) -> None:
    submit()
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("quickstart-")


def test_chain_and_after_are_dependencies(calls: Path) -> None:
    submit("--output", "out", "--chain", "2", "--after", "5,6")
    first, second = calls.read_text().splitlines()
    assert "--dependency=afterok:5:6 --kill-on-invalid-dep=yes" in first
    assert "--dependency=afterok:11 " in second
    assert load_config(Path("out/job/config.yaml")).cluster.max_restarts == 0


def test_dry_run_prints_the_script_and_leaves_nothing(calls: Path, tmp_path: Path) -> None:
    script = submit("--dry-run", "--nodes", "3", "--seeds", "1,2", "data.train=missing.jsonl", exit_code=2)
    assert script.startswith("#!/usr/bin/env bash\n") and "#SBATCH --nodes=3" in script
    assert "#SBATCH --account=research" in script and "#SBATCH --array=1,2" in script
    assert not calls.exists() and not (tmp_path / "runs").exists()


def test_job_that_cannot_run_is_not_submitted(calls: Path) -> None:
    with pytest.raises(UserError, match=r"data.train=missing.jsonl: no such file"):
        submit("data.train=missing.jsonl")
    assert not calls.exists()


def test_machine_without_slurm_says_so(calls: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on PATH"):
        submit("--output", "out")


def test_a_job_that_slurm_refuses_leaves_what_was_there_before(calls: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"Invalid account. Check account in the site file"):
        submit()  # the site's root is not there
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "other").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for output in ("empty", "full", "full/inner/most"):
        with pytest.raises(UserError, match="Invalid account"):
            submit("--output", output)
    assert sorted(tmp_path.rglob("*")) == before
