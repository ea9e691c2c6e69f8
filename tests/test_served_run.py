"""Runs whose teacher is served: what is left when its servers die, and that nothing secret is written."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mopd_nemo.commands.train import UNTAUGHT, run_training
from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.engines import served
from mopd_nemo.files import read_rows, write_rows
from mopd_nemo.run.checkpoints import checkpoints
from mopd_nemo.run.directory import RunDirectory
from tests.conftest import QUICKSTART
from tests.engines.scripted_server import ScriptedServer
from tests.test_trainer import without_times

SMALL = [
    "method=opd",
    "teacher.kind=server",
    "teacher.retries=1",
    "divergence.support=teacher_topk",
    "divergence.k=8",
    "rollout.num_prompts_per_step=2",
    "rollout.num_rollouts_per_prompt=2",
    "data.num_train=8",
    "train.num_steps=4",
    "train.eval_every=0",
    "train.checkpoint_every=9",
]
KEY = "sk-very-secret-4711"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("MOPD_TEACHER_API_KEY", KEY)


def new_server() -> ScriptedServer:
    return ScriptedServer(Path(resolve_model_path("embedded:arithmetic")), api_key=KEY)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with new_server() as server:
        yield server


def train(path: Path, *servers: ScriptedServer, settings: tuple[str, ...] = ()) -> int:
    urls = ",".join(server.url for server in servers)
    return run_training(QUICKSTART, None, [f"run_dir={path}", *SMALL, f"teacher.urls=[{urls}]", *settings])


def dies_at(server: ScriptedServer, completion: int) -> None:
    """In the middle of a step of four."""
    asked = len(server.asked)

    def before() -> None:
        if len(server.asked) - asked >= completion:
            server.die()

    server.before = before


def assert_same_run(one: RunDirectory, other: RunDirectory) -> None:
    rows = [without_times(read_rows(run.metrics_file)) for run in (one, other)]
    for row in [*rows[0], *rows[1]]:
        row.pop("score/retries"), row.pop("score/replicas")
    assert rows[0] == rows[1]
    weights = [load_file(checkpoints(run.checkpoints)[-1] / "model.safetensors") for run in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_whose_teacher_dies_is_saved_and_continues_as_if_nothing_was(
    tmp_path: Path, server: ScriptedServer, capsys: pytest.CaptureFixture[str], lag: int
) -> None:
    settings = (f"rollout.lag={lag}",)
    assert train(tmp_path / "whole", server, settings=settings) == 0
    whole = RunDirectory.open(tmp_path / "whole")
    dies_at(server, 2 + 2 * 4 + 2)  # two requests when it starts, two steps, half of the third
    assert train(tmp_path / "cut", server, settings=settings) == UNTAUGHT
    said = " ".join(capsys.readouterr().out.split())
    assert server.url in said and "The run is saved as it was before this step" in said and "--resume" in said
    run = RunDirectory.open(tmp_path / "cut")
    assert [c.name for c in checkpoints(run.checkpoints)] == ["step_000002"]
    with new_server() as again:
        assert run_training(None, run.path, [f"teacher.urls=[{again.url}]"]) == 0
    assert_same_run(whole, run)


def test_a_teacher_that_dies_in_the_first_step(tmp_path: Path, server: ScriptedServer) -> None:
    dies_at(server, 3)
    assert train(tmp_path / "run", server) == UNTAUGHT
    run = RunDirectory.open(tmp_path / "run")
    assert [c.name for c in checkpoints(run.checkpoints)] == ["step_000000"]
    with new_server() as again:
        assert run_training(None, run.path, [f"teacher.urls=[{again.url}]"]) == 0


def test_with_a_second_replica_the_run_goes_on(tmp_path: Path, server: ScriptedServer) -> None:
    assert train(tmp_path / "whole", server) == 0
    with new_server() as second:
        dies_at(second, 2 + 1)
        assert train(tmp_path / "run", server, second, settings=("teacher.max_in_flight=1",)) == 0
    run = RunDirectory.open(tmp_path / "run")
    assert read_rows(run.metrics_file)[-1]["score/replicas"] == 1
    assert_same_run(RunDirectory.open(tmp_path / "whole"), run)


def test_a_key_is_in_no_file_and_on_no_screen(
    tmp_path: Path, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    dies_at(server, 8)
    assert train(tmp_path / "run", server, settings=("logging.tensorboard=true",)) == UNTAUGHT
    shown = "".join(capsys.readouterr())
    assert server.url in shown and KEY not in shown
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 5 and not any(KEY.encode() in file.read_bytes() for file in files)


def write_rows_of_two_tasks(file: Path) -> None:
    rows = [
        {"id": f"{task}{i}", "prompt": f"{task} {i}", "answer": "4", "task": task} | more
        for task, more in (("math", {}), ("arithmetic", {}), ("math", {"teacher": "other"}))
        for i in range(100 * bool(more), 100 * bool(more) + 3)
    ]
    write_rows(file, rows)


def test_two_servers_get_the_rows_of_their_tasks(tmp_path: Path, server: ScriptedServer) -> None:
    """Or those that name them."""
    write_rows_of_two_tasks(tmp_path / "data.jsonl")
    with new_server() as other:
        settings = [setting for setting in SMALL if not setting.startswith(("teacher.", "data.", "train.num_steps"))]
        settings += [
            f"teachers.math={{kind: server, urls: [{server.url}]}}",
            f"teachers.other={{kind: server, urls: [{other.url}], tasks: [arithmetic]}}",
            f"data.train={tmp_path / 'data.jsonl'}",
            "rollout.num_prompts_per_step=9",
            "train.num_steps=1",
        ]
        assert run_training(QUICKSTART, None, [f"run_dir={tmp_path / 'run'}", *settings]) == 0
        asked = []
        for one in (server, other):
            texts = [one.chat.decode(ids) for ids in one.asked[2:]]  # after two that try it out
            asked.append(Counter(" ".join(text.split()[1:3]) for text in texts))
    assert asked[0] == {f"math {i}": 2 for i in range(3)}
    assert asked[1] == {f"arithmetic {i}": 2 for i in range(3)} | {f"math {i}": 2 for i in range(100, 103)}
