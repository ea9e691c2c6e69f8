"""Judges from outside the package: by import path in worker processes, and served over HTTP."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.config import Config, UserError
from mopd_nemo.config.load import config_from, dump_config
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.data.load import load_problems
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers import served
from mopd_nemo.verifiers.pool import VerifierPool

JUDGES = """
import os, sys, time
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.base import AnswerError, Verifier

def length(response, answer, finished):
    return len(response) / answer

def exact(response, answer, finished):
    return response == answer

def odd(response, answer, finished):
    match response:
        case "raise": raise RuntimeError("no such poem")
        case "sleep": time.sleep(60)
        case "exit": os._exit(3)
        case "leave": sys.exit(3)
        case "memory": return float(len(bytearray(1 << 32)))
        case "nan": return float("nan")
        case "none": return None
        case "text": return "good"
        case "object": return Verdict(1.0, Outcome.CORRECT, details={"x": object()})
        case "print": print("noise", flush=True)
    return 1.0

class Poem(Verifier):
    needs_worker = False

    @staticmethod
    def check_answer(answer):
        if not isinstance(answer, str):
            raise AnswerError(f"answer={answer!r}: give the first line")

    def judge(self, response, answer, finished):
        return Verdict(0.5, Outcome.WRONG, "It lacks a rhyme.", {"pid": os.getpid()})

class Broken(Verifier):
    def __init__(self, config):
        raise OSError("the dictionary is missing")

    def judge(self, response, answer, finished): ...

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with judges in it."""
    (tmp_path / "my_judges.py").write_text(JUDGES)
    (tmp_path / "my_broken.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_judges", raising=False)
    return tmp_path


def custom(judge: str, **limits: Any) -> VerifierConfig:
    return VerifierConfig.model_validate({"workers": 1, "custom": {"poem": {"judge": f"my_judges:{judge}", **limits}}})


def judged(config: VerifierConfig, *responses: str, answer: Any = 4, task: str = "poem") -> list[Verdict]:
    with VerifierPool(config, [task]) as pool:
        return [future.result() for future in [pool.submit(task, response, answer) for response in responses]]


def test_a_function_gives_a_reward_or_a_truth_value(here: Path) -> None:
    graded = judged(custom("length"), "abcd", "ab", "a")
    assert [(v.reward, v.outcome, v.success) for v in graded] == [
        (1.0, Outcome.CORRECT, True),
        (0.5, Outcome.CORRECT, True),
        (0.25, Outcome.WRONG, False),
    ]
    right, wrong = judged(custom("exact"), "rose", "Rose", answer="rose")
    assert (right.success, wrong.success, wrong.informative) == (True, False, False)


def test_a_verifier_judges_in_a_worker_whatever_it_says_of_itself(here: Path) -> None:
    import os

    (verdict,) = judged(custom("Poem"), "a rose", answer="x")
    assert (verdict.reward, verdict.feedback, verdict.success) == (0.5, "It lacks a rhyme.", True)
    assert verdict.details["pid"] != os.getpid()


def test_whatever_a_judge_does_is_no_failure_of_the_model(here: Path) -> None:
    reasons = {
        "raise": "RuntimeError: no such poem",
        "sleep": "not decided within 3 s",
        "exit": "the worker process ended",
        "leave": "the worker process ended",
        "memory": "MemoryError",
        "nan": "the reward nan",
        "none": "the judge returned None: return a Verdict, a number, or true or false",
        "text": "the judge returned 'good'",
        "object": "not JSON serializable",
    }
    verdicts = judged(custom("odd", seconds=3, memory_mb=2048), "fine", *reasons, "print")
    assert verdicts[0].success and verdicts[-1].success
    for verdict, (response, reason) in zip(verdicts[1:-1], reasons.items(), strict=True):
        assert verdict.outcome is Outcome.VERIFIER_ERROR and verdict.success is None, response
        assert reason in verdict.details["error"], response


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("my_judges:Nothing", "verifier.custom.poem=my_judges:Nothing: module my_judges has no Nothing"),
        ("no_judges:Poem", "verifier.custom.poem=no_judges:Poem: there is no module no_judges"),
        ("my_broken:Poem", "its module cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("my_judges:number", "neither a Verifier nor a function"),
    ],
)
def test_what_cannot_be_imported_is_said_at_the_start_with_its_key(here: Path, path: str, reason: str) -> None:
    write_problems(here)
    with pytest.raises(UserError, match=reason):
        load_problems(config(here, custom={"poem": path}, bad="skip"), "train")


def test_a_verifier_that_cannot_be_made_is_named(here: Path) -> None:
    with pytest.raises(UserError, match=r"a verifier cannot start: verifier.custom.poem: OSError: the dictionary is"):
        VerifierPool(custom("Broken"), ["poem"])


def write_problems(here: Path, **changes: Any) -> None:
    row = {"id": "1", "prompt": "Write.", "answer": "x", "task": "poem"} | changes
    (here / "problems.jsonl").write_text(json.dumps(row) + "\n")


def config(here: Path, bad: str = "stop", **verifier: Any) -> Config:
    data = {"train": str(here / "problems.jsonl"), "on_bad_row": bad}
    return config_from({"data": data, "verifier": verifier}, "test")


def test_tasks_and_answers_of_all_problems_are_checked_at_the_start(here: Path) -> None:
    named = config(here, custom={"poem": "my_judges:Poem"})
    write_problems(here)
    assert [problem.task for problem in load_problems(named, "train")] == ["poem"]
    write_problems(here, answer=3)
    with pytest.raises(UserError, match=r"line 1: answer=3: give the first line"):
        load_problems(named, "train")
    write_problems(here, task="pome")
    with pytest.raises(UserError, match=r"line 1: task=pome: choose arithmetic, .*poem, or write module:Name"):
        load_problems(named, "train")
    with pytest.raises(UserError, match=r"verifier.custom.math: a built-in task has this name"):
        load_problems(config(here, custom={"math": "my_judges:Poem"}), "train")


def test_a_config_with_judges_reads_back_as_it_was(here: Path) -> None:
    import yaml

    given = config(here, custom={"poem": "a.b:C"}, http={"song": {"url": "http://judge:1/x", "token_env": "T"}})
    assert config_from(yaml.safe_load(dump_config(given)), "again") == given


Script = Callable[["Judge"], None]


class Judge(BaseHTTPRequestHandler):
    """Plays the scripts of `Server`, one a request; the last one for all that follow."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append((body, dict(self.headers), time.monotonic()))
        self.server.scripts[min(number, len(self.server.scripts) - 1)](self)

    def send(self, status: int, body: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Judge)
        self.scripts: list[Script] = []
        self.asked: list[tuple[dict[str, Any], dict[str, str], float]] = []
        self.lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        pass

    def judged(self, *responses: str, **settings: Any) -> list[Verdict]:
        return judged(self.config(**settings), *responses, task="song", answer={"any": ["JSON"]})

    def config(self, **settings: Any) -> VerifierConfig:
        url = f"http://127.0.0.1:{self.server_port}/verdict"
        return VerifierConfig.model_validate({"http": {"song": {"url": url, "seconds": 2, "retries": 2} | settings}})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(served, "_FIRST_WAIT", 0.05)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def says(**fields: Any) -> Script:
    return lambda judge: judge.send(200, json.dumps(fields))


def status(number: int, **headers: str) -> Script:
    return lambda judge: judge.send(number, "overloaded", **headers)


def dribble(judge: Judge) -> None:
    """A body of which a byte comes every now and then, without end."""
    judge.send_response(200)
    judge.send_header("Content-Length", "1000000")
    judge.end_headers()
    for _ in range(200):
        judge.wfile.write(b" ")
        time.sleep(0.05)


def test_a_request_and_its_verdict(server: Server) -> None:
    server.scripts = [says(reward=0.75, feedback="Too short.", details={"model": "judge-1"}), says(reward=0)]
    first, second = (server.judged(response)[0] for response in ("la la", "la"))
    assert server.asked[0][0] == {"task": "song", "response": "la la", "answer": {"any": ["JSON"]}, "finished": True}
    assert (first.reward, first.outcome, first.success) == (0.75, Outcome.CORRECT, True)
    assert (first.feedback, first.informative, first.details) == ("Too short.", True, {"model": "judge-1"})
    assert (second.reward, second.outcome, second.success, second.informative) == (0.0, Outcome.WRONG, False, False)


def test_what_may_pass_is_tried_again_with_longer_waits(server: Server) -> None:
    server.scripts = [status(503), lambda judge: judge.connection.close(), says(reward=1, outcome="correct")]
    (verdict,) = server.judged("la")
    assert verdict.success and len(server.asked) == 3
    first, second, third = (at for *_, at in server.asked)
    assert second - first >= 0.05 and third - second >= 0.1


def test_the_server_may_say_how_long_to_wait(server: Server) -> None:
    server.scripts = [status(429, Retry_After="1"), says(reward=1)]
    (verdict,) = server.judged("la")
    assert verdict.success and server.asked[1][2] - server.asked[0][2] >= 1.0


@pytest.mark.parametrize(
    ("script", "tries", "reason"),
    [
        (status(500), 3, "status 500 .*tried 3 times"),
        (status(404), 1, "status 404"),
        (status(302, Location="http://127.0.0.1:1/"), 1, "status 302"),
        (dribble, 3, "no answer within 0.5 s; tried 3 times"),
        (lambda judge: time.sleep(1.0), 3, "no answer within 0.5 s"),
        (lambda judge: judge.send(200, "fine"), 1, "no JSON: b'fine'"),
        (lambda judge: judge.send(200, "[1]"), 1, "no JSON object"),
        (lambda judge: judge.send(200, " " * (1 << 20) + "{}"), 1, "more than 1048576 bytes"),
        (says(reward="1"), 1, "the reward '1', which is no number"),
        (says(reward=True), 1, "the reward True"),
        (says(score=1), 1, "unknown fields: score"),
        (lambda judge: judge.send(200, '{"reward": NaN}'), 1, "no finite number"),
        (says(reward=1, outcome="great"), 1, "'great' is not a valid Outcome"),
        (says(error="the judge's model is loading"), 1, "it says: the judge's model is loading"),
        (says(reward=1, feedback=3), 1, "a feedback that is no text"),
    ],
)
def test_whatever_goes_wrong_is_no_failure_of_the_model(
    server: Server, script: Script, tries: int, reason: str
) -> None:
    server.scripts = [script]
    (verdict,) = server.judged("la", seconds=0.5)
    assert verdict.outcome is Outcome.VERIFIER_ERROR and verdict.success is None
    error = verdict.details["error"]
    assert len(server.asked) == tries and f"verifier.http.song.url=http://127.0.0.1:{server.server_port}" in error
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(error)


def test_no_more_requests_are_open_than_allowed(server: Server) -> None:
    inside: set[int] = set()
    most = []

    def slow(judge: Judge) -> None:
        with server.lock:
            inside.add(id(judge))
            most.append(len(inside))
        time.sleep(0.05)
        with server.lock:
            inside.remove(id(judge))
        judge.send(200, '{"reward": 1}')

    server.scripts = [slow]
    verdicts = server.judged(*map(str, range(12)), in_flight=3)
    assert all(verdict.success for verdict in verdicts) and max(most) == 3


def test_a_token_is_sent_and_told_to_nobody(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"verifier.http.song.token_env=JUDGE_TOKEN: this environment variable is not"):
        server.judged("la", token_env="JUDGE_TOKEN")
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    server.scripts = [says(error="s3cret is not a token that I know")]
    with caplog.at_level(logging.DEBUG):
        (verdict,) = server.judged("la", token_env="JUDGE_TOKEN")
    assert server.asked[0][1]["Authorization"] == "Bearer s3cret"
    assert "[token] is not a token" in verdict.details["error"]
    whole = f"{verdict}{caplog.text}{server.config(token_env='JUDGE_TOKEN')}"
    assert "s3cret" not in whole


def test_a_judge_that_is_not_there_is_said_at_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    config = VerifierConfig.model_validate({"http": {"song": {"url": f"http://127.0.0.1:{port}/v"}}})
    with pytest.raises(UserError, match=rf"verifier.http.song.url=http://127.0.0.1:{port}/v: nobody answers there"):
        VerifierPool(config, ["song"])


def test_a_pool_that_is_closed_asks_no_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "_FIRST_WAIT", 30.0)
    server.scripts = [status(503)]
    pool = VerifierPool(server.config(), ["song"])
    pool.submit("song", "la", None)
    while not server.asked:
        time.sleep(0.01)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5 and len(server.asked) == 1
