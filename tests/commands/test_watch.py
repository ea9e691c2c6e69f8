"""`mopd watch`: what its server answers, what it refuses, and what the page keeps for its reader."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mopd_nemo.commands.watch import Page, serving
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import append_row, write_rows
from mopd_nemo.run.directory import RunDirectory
from tests.browser import Browser
from tests.conftest import QUICKSTART

ROW = {"loss": 0.5, "success_rate": 0.5, "signal": 1.0, "response/tokens": 9.0, "seconds/step": 1.0} | {
    f"seconds/{name}": 0.1 for name in ("generate", "reward", "context", "score", "update", "other")
}


def make_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    run.create(load_config(QUICKSTART, ["train.num_steps=9"]))
    return run


def add_step(run: RunDirectory, step: int) -> None:
    """A step with groups `p-STEP` and `q`, half right, as a trainer writes it."""
    rows = [
        {
            "step": step,
            "problem": name,
            "prompt": "?",
            "answer": "2",
            "rollout": number,
            "response": f"answer {number} of {name}",
            "finished": True,
            "reward": float(number),
            "success": number == 1,
            "outcome": "correct" if number else "wrong",
            "teacher_prompt": None,
            "peers": [],
            "sources": [],
        }
        for name in (f"p-{step}", "q")
        for number in (0, 1)
    ]
    write_rows(run.rollouts_file(step), rows)
    append_row(run.metrics_file, {"step": step, **ROW})


Ask = Callable[..., tuple[int, str, dict[str, str]]]


@contextmanager
def asking(*paths: Path) -> Iterator[Ask]:
    """A server of these runs that looks at them at every request, and a way to ask it."""
    with serving(paths) as (server, pages):

        def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
            for page in pages:
                page._next = 0.0
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
            connection.putrequest(method, path, skip_host=True)
            for name, value in ({"Host": f"localhost:{server.server_address[1]}"} | headers).items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.headers)

        yield ask


def state(ask: Ask, page: int = 0) -> dict[str, Any]:
    return json.loads(ask(f"/state.json?page={page}")[1])[page]


def test_a_run_is_followed_from_before_it_exists_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with asking(path) as ask:
        assert "not there yet" in state(ask)["trouble"]
        assert ask("/page/0")[:2] == (200, "")
        run = make_run(path)
        assert state(ask)["text"] == "no step is done yet"
        assert "Nothing recorded yet" in ask("/page/0")[1]
        before = sorted(path.rglob("*"))
        add_step(run, 1)
        now = state(ask)
        assert (now["text"], now["version"], now["trouble"]) == ("step 1 of 9", 2, "")
        assert "p-1" in ask("/page/0")[1]
        assert state(ask)["version"] == 2, "nothing has changed"
        add_step(run, 9)
        assert state(ask)["text"] == "all 9 steps done"
        shutil.rmtree(path)
        assert "not there yet" in state(ask)["trouble"] and "p-9" in ask("/page/0")[1]
    assert before == sorted([path, *(path / name for name in ("checkpoints", "config.yaml", "rollouts"))])[1:]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"step": 2, "lo'),
        ("metrics.jsonl", 'nonsense\n{"step": 3}\n'),
        ("metrics.jsonl", '{"step": 2}\n'),
        ("eval.jsonl", '{"step": 0}\n'),
        ("config.yaml", "method: [\n"),
        ("config.yaml", "a: 1\n"),
        ("rollouts/step_000001.jsonl", '{"step": 1}\n'),
        ("rollouts/step_000002.jsonl", "\0\0\0"),
    ],
)
def test_the_page_stays_while_a_file_is_being_written(tmp_path: Path, name: str, text: str) -> None:
    run = make_run(tmp_path / "run")
    add_step(run, 1)
    with asking(run.path) as ask:
        assert state(ask)["version"] == 1
        file = run.path / name
        whole = file.read_text() if file.exists() else None
        with file.open("w" if name.startswith(("config", "roll")) else "a") as written:
            written.write(text)
        shown = state(ask)
        if shown["version"] == 1:
            assert shown["trouble"].startswith("not refreshed: ")
        assert "<h1>quickstart</h1>" in ask("/page/0")[1]
        if whole is None:
            file.unlink()
        else:
            file.write_text(whole)
        assert state(ask)["trouble"] == ""


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml",
        "/../config.yaml",
        "/page/../../config.yaml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page/0/../../../etc/passwd",
        "//etc/passwd",
        "/page/1",
        "/page/-1",
        "/page/99999999999999999999",
        "/page/٠",
        "/page/0%00",
        "http://127.0.0.1/page/0",
        "file:///etc/passwd",
        "",
        "*",
    ],
)
def test_no_path_leads_to_a_file(tmp_path: Path, path: str) -> None:
    run = make_run(tmp_path / "run")
    add_step(run, 1)
    with serving([run.path]) as (server, pages):
        pages[0].refresh()
        with socket.create_connection(server.server_address) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            answer = raw.makefile("rb").read()
        assert re.match(rb"HTTP/1\.. 4\d\d|<!DOCTYPE HTML>|no such page$", answer), answer[:80]
        assert b"num_steps" not in answer and b"root:" not in answer and b"quickstart" not in answer


def test_links_out_of_the_run_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "step_000002.jsonl").write_text('{"step": 2, "problem": "SECRET"}\n')
    (secret / "config.yaml").write_text("name: SECRET\n")
    for number, (link, target) in enumerate(
        {"config.yaml": "config.yaml", "rollouts": ".", "metrics.jsonl": "step_000002.jsonl"}.items()
    ):
        run = make_run(tmp_path / f"run-{number}")
        there = run.path / link
        shutil.rmtree(there) if there.is_dir() else there.unlink(missing_ok=True)
        there.symlink_to(secret / target)
        with asking(run.path) as ask:
            assert state(ask)["trouble"] == f"not refreshed: {there}: leads out of the run; it is not read"
            assert ask("/page/0")[1] == ""


def test_a_link_to_a_run_and_links_within_it_are_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "disk" / "run")
    add_step(run, 1)
    (run.path / "rollouts" / "step_000002.jsonl").symlink_to("step_000001.jsonl")
    (tmp_path / "link").symlink_to(run.path)
    with asking(tmp_path / "link") as ask:
        assert state(ask)["version"] == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "MKCOL", "get"])
def test_it_can_only_be_read(tmp_path: Path, method: str) -> None:
    run = make_run(tmp_path / "run")
    with asking(run.path) as ask:
        before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}
        assert ask("/page/0", method)[0] in (405, 501)
        assert before == {file: file.stat().st_mtime_ns for file in run.path.rglob("*")}


def test_a_head_request_has_no_body(tmp_path: Path) -> None:
    with asking(tmp_path / "run") as ask:
        status, body, headers = ask("/", "HEAD")
        assert (status, body) == (200, "") and int(headers["Content-Length"]) > 1000
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("localhost:80.evil.example", 403),
        ("127.0.0.1@evil.example", 403),
        ("", 403),
    ],
)
def test_other_names_for_this_machine_are_refused(tmp_path: Path, host: str, status: int) -> None:
    """A page of another site can point its own name here (DNS rebinding)."""
    with asking(tmp_path / "run") as ask:
        for path in ("/", "/state.json", "/page/0"):
            assert ask(path, Host=host)[0] == status


def test_a_reader_who_leaves_in_mid_page_is_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run")
    with serving([tmp_path / "run"]) as (server, pages):
        pages[0].html = b"x" * 20_000_000
        reader = socket.create_connection(server.server_address[:2])
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reader.sendall(b"GET /page/0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert reader.recv(100)
        reader.close()
        while any("process_request" in thread.name for thread in threading.enumerate()):
            time.sleep(0.01)
    assert capsys.readouterr().err == ""


def test_several_runs(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / place / "run") for place in ("a", "b"))
    add_step(first, 1)
    with asking(first.path, second.path, tmp_path / "later") as ask:
        names = [page["name"] for page in json.loads(ask("/state.json")[1])]
        assert names == [str(first.path), str(second.path), "later", "all in one"]
        assert state(ask, 3)["text"] == "2 runs" and state(ask, 3)["trouble"].endswith("later")
        assert "2 runs side by side" in ask("/page/3")[1]


def test_a_taken_port_and_a_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: a file"), serving([tmp_path / "file"]):
        pass
    with serving([tmp_path]) as (server, _):
        port = server.server_address[1]
        with pytest.raises(UserError, match=f"--port {port}: .*in use"), serving([tmp_path], port):
            pass


def test_pages_are_not_made_more_often_than_time_allows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = Page("run", [run], tmp_path / "page.html", every=1000.0)
    page.refresh()
    add_step(run, 1)
    page.refresh()
    assert page.version == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_cleanly(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "mopd_nemo", "watch", str(tmp_path / "run")]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert watching.stdout is not None
    address = watching.stdout.readline()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\n", address)
    os.kill(watching.pid, number)
    out, err = watching.communicate(timeout=20)
    assert (watching.returncode, err) == (0, "") and out.endswith("ended\n")


# ---- in a browser


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    monkeypatch.setattr("mopd_nemo.commands.watch.SHARE", 1000.0)  # pages may be made all the time
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


class Watched:
    """A page in a browser, and what its first pane shows."""

    def __init__(self, browser: Browser, address: str, width: int) -> None:
        self.browser = browser
        browser.open(address, width)

    def inside(self, expression: str) -> Any:
        """The value of an expression in which `page` is the report on the screen, and `view` its window."""
        frame = "document.querySelector('section:not([hidden]) iframe:not(.next)')"
        return self.browser.evaluate(
            f"(frame => {{ if (!frame) return null; const view = frame.contentWindow, page = frame.contentDocument; "
            f"return {expression}; }})({frame})"
        )

    def wait(self, expression: str, inside: bool = True) -> None:
        until = time.monotonic() + 30
        while not (self.inside if inside else self.browser.evaluate)(expression):
            assert time.monotonic() < until, expression
            time.sleep(0.1)


HELD = "!document.querySelector('button').hidden"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_reader_keeps_what_they_unfolded_and_where_they_were(tmp_path: Path, browser: Browser, width: int) -> None:
    run = make_run(tmp_path / "run")
    with serving([run.path], every=0.1) as (server, _):
        watched = Watched(browser, f"http://127.0.0.1:{server.server_address[1]}/", width)
        watched.wait("page.body.textContent.includes('Nothing recorded yet')")
        add_step(run, 1)
        watched.wait("page.body.textContent.includes('p-1')")
        # settings are on every page: they stay unfolded, at the same height, when a step arrives
        settings = "[...page.querySelectorAll('details')].at(-1)"
        watched.inside(f"{settings}.querySelector('summary').click()")
        watched.wait(f"{settings}.open")
        watched.inside(f"view.scrollBy(0, {settings}.getBoundingClientRect().top - 40)")
        add_step(run, 2)
        watched.wait("page.body.textContent.includes('p-2')")
        assert watched.inside(f"{settings}.open")
        assert abs(watched.inside(f"{settings}.getBoundingClientRect().top") - 40) < 2
        # a group of step 2 is on no later page: it stays until the reader folds it
        group = "[...page.querySelectorAll('details.group')].at(-1)"
        watched.inside("view.scrollTo(0, 0)")
        watched.inside(f"{group}.querySelector('summary').click()")
        watched.wait(f"{group}.open")
        add_step(run, 3)
        watched.wait(HELD, inside=False)
        assert watched.inside("page.body.textContent.includes('p-2')") and watched.inside(f"{group}.open")
        watched.inside(f"{group}.querySelector('summary').click()")
        watched.wait("page.body.textContent.includes('p-3')")
        assert not watched.browser.evaluate(HELD)


def test_a_held_page_goes_on_when_the_reader_says_so(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run")
    add_step(run, 1)
    with serving([run.path], every=0.1) as (server, _):
        watched = Watched(browser, f"http://127.0.0.1:{server.server_address[1]}/", 1280)
        watched.wait("page.body.textContent.includes('p-1')")
        watched.inside("[...page.querySelectorAll('details.group')].at(-1).querySelector('summary').click()")
        time.sleep(0.2)
        add_step(run, 2)
        watched.wait(HELD, inside=False)
        watched.browser.evaluate("document.querySelector('button').click()")
        watched.wait("page.body.textContent.includes('p-2')")


def test_runs_side_by_side(tmp_path: Path, browser: Browser) -> None:
    runs = [make_run(tmp_path / name) for name in ("first", "second")]
    for step, run in enumerate(runs, start=1):
        add_step(run, step)
    with serving([run.path for run in runs], every=0.1) as (server, _):
        watched = Watched(browser, f"http://127.0.0.1:{server.server_address[1]}/", 1280)
        watched.wait("page.body.textContent.includes('2 runs side by side')")
        watched.browser.evaluate("location.hash = '#side'")
        texts = "[...document.querySelectorAll('iframe')].map(f => f.contentDocument.body.textContent)"
        watched.wait(f"{texts}.some(t => t.includes('p-1')) && {texts}.some(t => t.includes('p-2'))", inside=False)
        boxes = "[...document.querySelectorAll('section')].filter(s => s.style.display !== 'none')"
        assert watched.browser.evaluate(f"{boxes}.map(s => s.getBoundingClientRect().x)") == [0, 640]


def test_the_page_says_when_the_server_has_ended(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run")
    add_step(run, 1)
    with serving([run.path], every=0.1) as (server, _):
        watched = Watched(browser, f"http://127.0.0.1:{server.server_address[1]}/", 1280)
        watched.wait("page.body.textContent.includes('p-1')")
    watched.wait("document.body.textContent.includes('mopd watch has ended')", inside=False)
    assert watched.inside("page.body.textContent.includes('p-1')")
