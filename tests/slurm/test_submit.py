import os
from pathlib import Path

import pytest

from mopd_nemo.config.load import load_config
from mopd_nemo.slurm.job import Job
from mopd_nemo.slurm.site import SiteConfig
from mopd_nemo.slurm.submit import memory_lines, model_problems, problems_of, unwritable
from tests.conftest import QUICKSTART

PAPER = Path(__file__).parents[2] / "configs" / "paper"


def problems(tmp_path: Path, *overrides: str, **site: object) -> list[str]:
    job = Job(load_config(QUICKSTART, overrides), SiteConfig.model_validate(site), tmp_path / "run", tmp_path)
    return problems_of(job)


def test_nothing_is_wrong_with_the_quickstart(tmp_path: Path) -> None:
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("overrides", "site", "message"),
    [
        ([], {"mounts": ["/nowhere"]}, "mounts: /nowhere: no such directory here"),
        ([], {"image": "/nowhere/image.sqsh"}, "image: /nowhere/image.sqsh: no such file; `enroot import` makes it"),
        (["data.train=missing.jsonl"], {}, "data.train=missing.jsonl: no such file in"),
        (
            ["model.path=Qwen/Qwen3-8B"],
            {},
            "the site file names no hf_home; fetch it first: HF_HOME=DIR hf download Qwen",
        ),
        (["model.path=/nowhere/model"], {"hf_home": "/hf"}, "model.path=/nowhere/model: no such model in hf_home=/hf"),
        ([], {"secrets": "/nowhere/secrets"}, "secrets: /nowhere/secrets: no such file"),
    ],
)
def test_what_a_job_would_fail_on_is_named(
    tmp_path: Path, overrides: list[str], site: dict[str, object], message: str
) -> None:
    (found,) = problems(tmp_path, *overrides, **site)
    assert message in found


def test_paths_of_the_nodes_alone_are_not_looked_for(tmp_path: Path) -> None:
    assert problems(tmp_path, node_mounts=["/nowhere"], image="registry#image:tag") == []


def test_secrets_that_others_can_read_or_that_are_no_assignments(tmp_path: Path) -> None:
    file = tmp_path / "secrets.env"
    file.write_text("# mine\nWANDB_API_KEY=1\n\nhello\n")
    file.chmod(0o644)
    first, second = problems(tmp_path, secrets=str(file))
    assert f"others can read it; chmod 600 {file}" in first
    assert "line 4: not of the form NAME=value" in second and "hello" not in second


def test_place_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert "is no directory" in (unwritable(tmp_path / "file" / "run") or "")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert "cannot write in" in (unwritable(tmp_path / "a" / "b") or "")


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        ("mopd-qwen3-8b-chemistry-1n8g-tp2", "nemo.student.tensor=1", "update may need"),
        ("mopd-qwen3-8b-chemistry-1n8g-tp2", "nemo.generation.gpu_memory_utilization=0.95", "generate may need"),
        ("mopd-qwen3-14b-to-4b-tooluse-2n8g-tp2", "model.path=Qwen/Qwen3-32B", "update may need"),
    ],
)
def test_what_looks_too_much_is_said_with_the_keys_to_change_and_not_refused(
    config: str, override: str, message: str
) -> None:
    overrides = [override, "nemo.student.sequence=false"] if override.endswith("tensor=1") else [override]
    settings = load_config(PAPER / f"{config}.yaml", overrides)
    estimated, remark, *_ = memory_lines(settings, SiteConfig())
    assert estimated.startswith("estimated GB on a GPU of 80: generate") and message in remark
    assert model_problems(settings, SiteConfig()) == []


def test_teacher_of_another_vocabulary_is_refused() -> None:
    file = PAPER / "mopd-qwen3-14b-to-4b-tooluse-2n8g-tp2.yaml"
    config = load_config(file, ["teacher.path=meta-llama/Llama-3.3-70B-Instruct"])
    assert "a vocabulary of 128256" in model_problems(config, SiteConfig())[0]
