"""Every config of a recipe: whole, small enough, fits its GPUs, and renders the script it rendered before.

`MOPD_UPDATE_SNAPSHOTS=1 pytest tests/slurm` writes the snapshots anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mopd_nemo.chat import Chat
from mopd_nemo.cli import app
from mopd_nemo.config.load import flatten, load_config
from mopd_nemo.data.sources import SOURCES
from mopd_nemo.engines.architecture import architecture_of
from mopd_nemo.engines.nemo.memory import estimate
from mopd_nemo.methods.base import make_method
from mopd_nemo.run.directory import write_rows
from mopd_nemo.run.display import WARM_UP_STEPS
from mopd_nemo.slurm.job import Job, render
from mopd_nemo.slurm.site import SiteConfig
from mopd_nemo.slurm.submit import memory_lines, model_problems
from recipes import paper_table
from tests.analysis.test_compare import write_run
from tests.conftest import QUICKSTART, make_group

ROOT = Path(__file__).parents[2]
LEAVES = sorted(file for folder in ("paper", "beyond") for file in (ROOT / "configs" / folder).glob("*-qwen3-*.yaml"))
CONFIGS, RECIPES = ROOT / "configs" / "paper", ROOT / "recipes"
VALUES = yaml.safe_load((CONFIGS / "values.yaml").read_text())
TABLES = {number: paper_table.Table.read(number) for number in VALUES["tables"]}
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
    assert model_problems(config, SITE) == []
    assert len(memory_lines(config, SITE)) == 1, "the estimate, and no remark"
    student = architecture_of(config.model.path, None)
    assert student is not None, "a model of unknown size would not be checked"
    teacher = architecture_of(config.teacher.path, None) if config.teacher.path else None
    assert config.teacher.path is None or teacher is not None
    needed = estimate(config, student, teacher, 80)
    assert 20 < needed.peak < 80


@parametrized
def test_config_has_the_settings_that_the_paper_states(file: Path) -> None:
    config = load_config(file)
    values = flatten(config)
    kinds = {"every run": file.parent.name == "paper"}
    kinds["divergence"] = config.method in ("mopd", "sdpo", "opd")
    kinds["mathematics"] = "-maths-" in file.stem
    kinds["divergence in mathematics"] = kinds["divergence"] and kinds["mathematics"]
    kinds["mopd"] = config.method == "mopd" and re.search(r"-tp\d+$", file.stem) is not None  # no ablation
    stated = VALUES["settings"]
    assert kinds.keys() == stated.keys()
    expected = {key: value for kind, given in stated.items() if kinds[kind] for key, value in given.items()}
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("file", [file for file in LEAVES if file.parent.name == "paper"], ids=lambda file: file.stem)
def test_config_does_what_the_authors_code_does_where_the_paper_is_silent(file: Path) -> None:
    config = load_config(file)
    values = flatten(config)
    reads_peers = config.method in ("mopd", "sdpo")
    whole = re.search(r"-tp\d+$", file.stem) is not None
    kinds = {
        "every run": True,
        "LiveCodeBench": "livecodebench" in file.stem,
        "sampled rollouts": config.method != "gkd",
        "moving average": config.teacher.kind == "ema",
        "divergence": config.method in ("mopd", "sdpo", "opd"),
        "peers": reads_peers,
        "mopd": config.method == "mopd" and whole and "livecodebench" not in file.stem,
        "mopd on LiveCodeBench": config.method == "mopd" and whole and "livecodebench" in file.stem,
        "sdpo": config.method == "sdpo" and re.search("livecodebench|tooluse", file.stem) is not None,
        "sdpo on choices and numbers": config.method == "sdpo" and not re.search("livecodebench|tooluse", file.stem),
    }
    stated = VALUES["code"]
    assert kinds.keys() == stated.keys()
    expected = {key: value for kind, given in stated.items() if kinds[kind] for key, value in given.items()}
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("row", VALUES["ablations"])
@pytest.mark.parametrize("task", ["chemistry", "livecodebench"])
def test_a_row_of_the_papers_ablation_shows_what_it_says(row: str, task: str) -> None:
    config = load_config(ROOT / f"configs/paper/mopd-qwen3-8b-{task}-1n8g-tp2-{row}.yaml")
    peers, stated = config.peers, VALUES["ablations"][row]
    assert [peers.successes, peers.failures, peers.summaries] == stated["peers"]
    shown = [peers.when_no_success, *(source for source in config.context if source != "peers")]
    assert shown == stated[task] and "peers" in config.context
    assert config.verifier.feedback.reveal_gold == (task == "livecodebench")
    assert ("<summary>" in config.data.train_prompt_suffix) == (peers.summaries > 0)


@parametrized
def test_no_peer_is_cut_that_the_budgets_would_hold(file: Path) -> None:
    config = load_config(file)
    if config.method in ("mopd", "sdpo"):
        assert config.peers.max_peer_tokens >= config.rollout.max_response_tokens


@pytest.mark.parametrize("task", ["chemistry", "maths"])
def test_an_all_failed_group_of_choices_or_numbers_gives_the_papers_sdpo_no_rows(task: str, chat: Chat) -> None:
    (file,) = CONFIGS.glob(f"sdpo-*-{task}-*.yaml")
    config = load_config(file)
    failed = make_group(chat, [("A", 0.0), ("B", 0.0)], feedback="The answer is wrong.")
    batch = make_method(config, chat).build([failed], step=1)
    assert batch.terms == []


@pytest.mark.parametrize(
    ("name", "success", "failure"),
    [
        ("1f", [(1, "failure")], [(2, "failure"), "feedback"]),
        ("1s1f", [(2, "failure")], [(0, "success"), (2, "failure")]),
        ("2s", None, [(0, "success")]),
        ("8s-2h", [(i, "failure") for i in (1, 2, 3)], None),
    ],
)
def test_contexts_of_table_4_on_livecodebench_are_the_authors(
    name: str, success: list[object] | None, failure: list[object] | None, chat: Chat
) -> None:
    """The targets 0, the one success of a group, and 1, a failure; then 1 where all failed."""
    method = make_method(load_config(CONFIGS / f"mopd-qwen3-8b-livecodebench-1n8g-tp2-{name}.yaml"), chat)

    def read_by(target: int, rewards: Sequence[float]) -> list[object] | None:
        group = make_group(chat, list(zip("axyz", rewards, strict=True)), feedback="Test 1 failed.")
        contexts = method.build([group], step=1).contexts
        assert contexts is not None
        context = contexts[0][target]
        peers = [(peer.rollout_index, peer.kind) for peer in context.selection.peers]
        return None if context.prompt_ids is None else [*peers, *(s for s in context.sources if s != "peers")]

    assert read_by(0, [1, 0, 0, 0]) == success
    if failure is not None:
        assert read_by(1, [1, 0, 0, 0]) == failure
    assert "feedback" in (read_by(1, [0, 0, 0, 0]) or [])


def test_config_is_commented_with_its_numbers() -> None:
    for cell in [cell for table in TABLES.values() if table.number not in ("1", "9") for cell in table.cells]:
        if cell.step is None and not cell.evaluate and cell.row != "1 successful solution":
            comment = (CONFIGS / f"{cell.config}.yaml").read_text()
            numbers = [f"{number:.2f}" for number in cell.paper.values() if number is not None]
            assert [number for number in numbers if number not in comment] == [], cell.config


@pytest.mark.parametrize("snapshot", sorted(SNAPSHOTS.glob("*.sbatch")), ids=lambda file: file.stem)
def test_script_is_the_one_on_record(snapshot: Path) -> None:
    [file] = [file for file in LEAVES if file.stem == snapshot.stem]
    config = load_config(file)
    job = Job(config, SITE, Path("/shared/runs") / config.name, Path("/shared/mopd-nemo"))
    if os.environ.get("MOPD_UPDATE_SNAPSHOTS"):
        snapshot.write_text(render(job))
    assert render(job) == snapshot.read_text()


def test_every_config_of_the_paper_is_in_a_table() -> None:
    in_tables = {cell.config for table in TABLES.values() for cell in table.cells}
    assert in_tables == {file.stem for file in LEAVES if file.parent.name == "paper"}


def test_every_recipe_has_its_script() -> None:
    scripts = {file.stem for file in RECIPES.glob("*.sh")}
    assert scripts == {f"table-{number}" for number in TABLES} | {"figure-3"}
    for number in TABLES:
        script = RECIPES / f"table-{number}.sh"
        assert os.access(script, os.X_OK) and f'/paper_table.py" {number} "$@"' in script.read_text()
        assert f"# Table {number}: {TABLES[number].title}." in script.read_text()


@pytest.mark.parametrize("number", TABLES)
def test_every_run_of_a_table_renders(number: str, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"root: {tmp_path}\n")
    table = TABLES[number]
    submissions = table.submissions(tmp_path / "runs", table.seeds)
    assert len(submissions) == len({cell.name for cell in table.cells}) * len(table.seeds)
    for directory, arguments in submissions.items():
        shown = CliRunner().invoke(app, [*arguments, "--site", str(site), "--dry-run"])
        assert shown.exit_code in (0, 2), shown.output  # 2: this machine lacks Slurm or the data
        assert str(directory / "job" / "code") in shown.output
        assert f"export MOPD_TASK={'eval' if '--task' in arguments else 'train'}" in shown.output
        assert f"export MOPD_SEED={directory.name.removeprefix('seed=')}" in shown.output
    assert not (tmp_path / "runs").exists()


def test_first_call_submits_and_a_later_one_compares(tmp_path: Path) -> None:
    """On stand-ins of Slurm (`sbatch`) and of the three runs of table 3; everything between is real."""
    record = tmp_path / "submitted"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {record}\necho 17\n')
    sbatch.chmod(0o755)
    site = tmp_path / "site.yaml"
    site.write_text(f"root: {tmp_path}\nhf_home: {tmp_path}\ngpu_request: none\n")
    environment = {
        **os.environ,
        "PATH": f"{sbatch.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MOPD_SITE": str(site),
    }
    overrides = [f"data.train={QUICKSTART}", f"data.eval={QUICKSTART}", "model.path=embedded:arithmetic"]

    def call(*arguments: str) -> str:
        command = [str(RECIPES / "table-3.sh"), str(tmp_path / "runs"), *arguments]
        return subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "3 of 3 runs submitted. The same command compares them" in call(*overrides)
    assert len(record.read_text().splitlines()) == 3
    assert call("--compare").count("not there yet") == 8
    for method, right in (("grpo", [4, 4]), ("sdpo", [6, 4]), ("mopd", [8, 4])):
        write_run(tmp_path / "runs" / f"{method}-qwen3-8b-tooluse-1n8g-tp2" / "seed=0", right, method=method)
    shown = call()
    assert len(record.read_text().splitlines()) == 3, "nothing is submitted twice"
    assert [line for line in shown.splitlines() if line.startswith("| ")] == [
        "| row | task | metric | paper | ours, counted so | ours, strict | seeds |",
        "| Qwen3-8B | tool use | mean@8 | 59.11 | not there yet | 25.00 | 1 |",
        "| GRPO | tool use | mean@8 | 60.32 | not there yet | 50.00 | 1 |",
        "| SDPO | tool use | mean@8 | 63.45 | not there yet | 62.50 | 1 |",
        "| MOPD | tool use | mean@8 | 66.73 | not there yet | 75.00 | 1 |",
    ]
    assert (tmp_path / "runs" / "table-3" / "tool-use" / "compare.md").exists()


def test_one_competition_is_read_off_the_samples_of_all(tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    outcomes = {"aime2025/1": "wrong correct", "aime2025/2": "wrong verifier_error", "aime2024/1": "correct correct"}
    rows = [{"problem": name, "outcome": outcome} for name, both in outcomes.items() for outcome in both.split()]
    write_rows(file, rows)
    assert paper_table.on_some_problems(file, "aime2025", "mean@8") == 0.25
    assert paper_table.on_some_problems(file, "aime2025", "pass@8") == 0.5
    assert paper_table.on_some_problems(file, "aime2025", "paper/mean@8") == 0.25
    assert paper_table.on_some_problems(file, "aime2025", "paper/pass@8") == 0.375, "one of two, drawn twice"
    with pytest.raises(ValueError, match="no problem's id begins with 'hmmt'"):
        paper_table.on_some_problems(file, "hmmt", "mean@8")


def test_competitions_are_told_apart_by_their_ids() -> None:
    names = {name for name in SOURCES if name.startswith(("aime", "hmmt"))}
    assert {cell.problems for cell in TABLES["1"].cells} == names


def test_seconds_leave_out_the_first_steps_and_add_up_the_paper_s_update(tmp_path: Path) -> None:
    assert paper_table.WARM_UP_STEPS == WARM_UP_STEPS
    slow = [{"seconds/score": 100.0, "seconds/update": 100.0}] * 5
    write_rows(tmp_path / "metrics.jsonl", [*slow, {"seconds/score": 2.0, "seconds/update": 3.0}])
    cell = paper_table.Cell("SDPO", "chemistry", "c", {"update": 75.0}, "c")
    assert paper_table.result(cell, tmp_path, "update") == 5.0


def test_every_config_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "reproduction.md").read_text()
    assert [file.stem for file in LEAVES if f"`{file.stem}`" not in text] == []


def test_documentation_has_the_numbers_of_the_tables() -> None:
    """Each row of docs/reproduction.md, by its row's and config's names, shows what values.yaml says."""
    text = (ROOT / "docs" / "reproduction.md").read_text()
    for number in map(str, range(1, 7)):
        section = text.split(f"## Table {number}:")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| ")]
        for cell in TABLES[number].cells:
            printed = " / ".join(f"{n:.2f}" for n in cell.paper.values() if n is not None) or "–"
            config = f"`{cell.config}`" if cell.step is None and not cell.evaluate else ""
            assert [row for row in rows if cell.row in row and config in row and f"| {printed} |" in row], cell
