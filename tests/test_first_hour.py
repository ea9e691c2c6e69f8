"""The list of what only GPUs can show: every run in it is a valid config, and its figures are judged and kept."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mopd_nemo.config import Config
from mopd_nemo.config.load import load_config

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "nemo_rl" / "first_hour.sh"


def listed(**environment: str) -> str:
    answer = subprocess.run([SCRIPT, "--dry-run"], capture_output=True, text=True, check=True, env=environment)
    return answer.stdout


@pytest.fixture(scope="module")
def commands() -> dict[str, list[list[str]]]:
    """The commands of every point."""
    found: dict[str, list[list[str]]] = {}
    for line in listed().splitlines():
        if line.startswith("    "):
            found[list(found)[-1]].append(shlex.split(line))
        else:
            found[line.partition(":")[0]] = []
    return found


def test_every_run_has_valid_settings_for_one_node_of_8_gpus(commands: dict[str, list[list[str]]]) -> None:
    configs = [config for runs in commands.values() for words in runs if (config := config_of(words)) is not None]
    assert len(configs) >= 18
    for config in configs:
        assert config.engine == "nemo" and config.nemo.num_nodes == 1 and config.nemo.gpus_per_node <= 8


def config_of(words: list[str]) -> Config | None:
    if "--config" not in words:
        return None
    file, *overrides = words[words.index("--config") + 1 :]
    return load_config(ROOT / file, overrides)


def test_what_continues_or_evaluates_a_run_names_keys_of_the_config(commands: dict[str, list[list[str]]]) -> None:
    every = [words for runs in commands.values() for words in runs]
    others = [words for words in every if "--config" not in words and "export" not in words]
    assert len(others) >= 3
    for words in others:
        load_config(ROOT / "configs/quickstart.yaml", [word for word in words if "=" in word])


def test_each_point_writes_to_a_directory_of_its_own(commands: dict[str, list[list[str]]]) -> None:
    for name, runs in commands.items():
        for words in runs:
            assert any(f"OUT/{name}/" in word for word in words), name


def test_points_and_models_can_be_chosen() -> None:
    out = listed(ONLY="starts resume", MODEL="some/model", TRAIN="a.jsonl")
    assert out.startswith("starts: ") and "\nresume: " in out and "\nrefit: " not in out
    assert "model.path=some/model data.train=a.jsonl" in out


def test_a_failed_point_is_recorded_the_next_one_runs_and_a_passed_one_is_kept(tmp_path: Path) -> None:
    """With a stand-in for the runs: `python` writes the metrics that a run would have."""
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/bin/bash
case "$1" in recipes/nemo_rl/*) exec {sys.executable} "$@" ;; esac
echo "$@" >> {tmp_path}/calls
case "$*" in *refit*) exit 3 ;; esac
run=${{@: -1}}; run=${{run#run_dir=}}
mkdir -p "$run"; echo '{{"step": 1, "loss": 0.5, "sampler/gap": 0.01}}' > "$run/metrics.jsonl"
"""
    )
    fake.chmod(0o755)
    environment = {"PYTHON": str(fake), "ONLY": "starts refit alignment", "PATH": "/usr/bin:/bin"}
    out = tmp_path / "out"
    first = subprocess.run([SCRIPT, out], capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 1, first.stderr
    assert [line.split(":")[0] for line in first.stdout.splitlines()[:3]] == [
        "PASS  starts", "FAIL  refit", "FAIL  alignment",
    ]  # fmt: skip
    table = {row["point"]: row for row in json.loads((out / "table.json").read_text())}
    assert table["starts"]["measured"] == 0.01 and table["starts"]["bound"] == "below 0.05"
    assert table["refit"]["measured"] is None and table["alignment"]["measured"] == 0.5
    assert "| alignment | 0.5 | below 0.001 | FAIL |" in (out / "table.md").read_text()
    before = (tmp_path / "calls").read_text().count("starts/run")
    again = subprocess.run([SCRIPT, out], capture_output=True, text=True, check=False, env=environment)
    assert again.stdout.startswith("PASSED BEFORE  starts\n")
    assert (tmp_path / "calls").read_text().count("starts/run") == before == 1
