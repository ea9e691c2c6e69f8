"""Every config of a recipe: whole, small enough, fits its GPUs, and renders the script it rendered before.

`MOPD_UPDATE_SNAPSHOTS=1 pytest tests/slurm` writes the snapshots anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from mopd_nemo.config.load import load_config
from mopd_nemo.slurm.architecture import architecture_of
from mopd_nemo.slurm.checks import memory_problems
from mopd_nemo.slurm.job import Job, render
from mopd_nemo.slurm.memory import estimate
from mopd_nemo.slurm.site import SiteConfig

ROOT = Path(__file__).parents[2]
LEAVES = sorted(file for folder in ("paper", "beyond") for file in (ROOT / "configs" / folder).glob("*.yaml"))
SNAPSHOTS = Path(__file__).with_name("snapshots")
SITE = SiteConfig(
    account="research",
    partition="batch",
    root="/shared/runs",
    image="/shared/images/mopd-nemo.sqsh",
    hf_home="/shared/huggingface",
    secrets="/home/me/secrets.env",
)
NAME = re.compile(
    r"(?P<method>mopd|sdpo|grpo|opd|gkd)-(?P<model>qwen3-[\w-]+?)-"
    r"(?P<task>livecodebench|maths|biology|chemistry|physics|materials|tooluse)-"
    r"(?P<nodes>\d+)n(?P<gpus>\d+)g-tp(?P<tensor>\d+)(ep(?P<expert>\d+))?(-\w+)*"
)
parametrized = pytest.mark.parametrize("file", LEAVES, ids=lambda file: file.stem)


def test_there_are_recipes_for_all_tables() -> None:
    assert len(LEAVES) == 46


@parametrized
def test_config_is_whole_and_named_by_what_it_says(file: Path) -> None:
    config = load_config(file)
    assert config.name == file.stem
    assert len(file.read_text().splitlines()) < 40
    match = NAME.fullmatch(file.stem)
    assert match is not None
    assert config.method == match["method"]
    assert (config.nemo.num_nodes, config.nemo.gpus_per_node) == (int(match["nodes"]), int(match["gpus"]))
    assert config.nemo.student.tensor == int(match["tensor"])
    assert config.nemo.student.expert == int(match["expert"] or 1)
    assert (config.teacher.kind == "external") == ("-to-" in match["model"])
    student = match["model"].split("-to-")[-1].removeprefix("qwen3-")
    assert config.model.path.lower().endswith(f"qwen3-{student}")


@parametrized
def test_config_fits_gpus_of_80_gb(file: Path) -> None:
    config = load_config(file)
    assert memory_problems(config, SITE) == []
    student = architecture_of(config.model.path, None)
    assert student is not None, "a model of unknown size would not be checked"
    teacher = architecture_of(config.teacher.path, None) if config.teacher.path else None
    assert config.teacher.path is None or teacher is not None
    assert 20 < estimate(config, student, teacher, 80).peak < 80


@parametrized
def test_config_follows_the_paper_s_budget(file: Path) -> None:
    config = load_config(file)
    assert (config.rollout.num_prompts_per_step, config.rollout.num_rollouts_per_prompt) == (32, 8)
    assert config.rollout.max_response_tokens == (8192 if "maths" in file.stem else 4096)
    assert config.optimizer.warmup_steps == 10 and config.eval.num_samples == 8
    if config.method in ("mopd", "sdpo", "opd"):
        assert config.divergence.kind == ("reverse_kl" if "maths" in file.stem else "jsd")
        assert config.divergence.k == 100


@parametrized
def test_script_is_the_one_on_record(file: Path) -> None:
    config = load_config(file)
    job = Job(config, SITE, Path("/shared/runs") / config.name, Path("/shared/mopd-nemo"))
    snapshot = SNAPSHOTS / f"{file.stem}.sbatch"
    if os.environ.get("MOPD_UPDATE_SNAPSHOTS"):
        snapshot.parent.mkdir(exist_ok=True)
        snapshot.write_text(render(job))
    assert render(job) == snapshot.read_text()


@parametrized
def test_recipe_submits_its_config(file: Path) -> None:
    recipe = ROOT / "recipes" / file.parent.name / f"{file.stem}.sh"
    assert os.access(recipe, os.X_OK)
    assert f"slurm/submit.sh --config configs/{file.parent.name}/{file.name} " in recipe.read_text()


def test_nothing_on_record_lacks_its_config() -> None:
    stems = {file.stem for file in LEAVES}
    assert {file.stem for file in SNAPSHOTS.glob("*.sbatch")} == stems
    assert {file.stem for folder in ("paper", "beyond") for file in (ROOT / "recipes" / folder).glob("*.sh")} == (
        stems | {"table-10"}
    )


def test_every_recipe_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "reproduction.md").read_text()
    assert [file.stem for file in LEAVES if f"`{file.stem}`" not in text] == []
