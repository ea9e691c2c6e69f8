"""`mopd watch`: the report of runs that go on, served on loopback and made again as rows arrive.

Nothing is written to a run. Requests name no files: a page is chosen by its number, so that no path can lead anywhere.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

import typer

from mopd_nemo.config import UserError
from mopd_nemo.files import DamagedError
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.terminal import Terminal

HOST = "127.0.0.1"
NAMES = {HOST, "localhost", "[::1]"}
"""Names that a browser may know this server by. Another one was made to point here by someone else."""
EVERY = 3.0
"""Seconds between two readings of a run's files."""
SHARE = 0.2
"""At most this share of a core goes into making pages."""
_SHELL = Path(__file__).with_name("watch.html")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; font-src data:; frame-src 'self'; connect-src 'self'; frame-ancestors 'self'; base-uri 'none'; "
    "form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def watch(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Runs; they need not exist yet.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine. Default: one that is free.")] = 0,
    every: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks at a run.")] = EVERY,
) -> None:
    """Show the report of a run in the browser while it trains; Ctrl-C ends it. Several runs stand side by side.

    mopd watch runs/quickstart-20260101-120000 --port 8765
    """
    console, stopped = Terminal(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stopped.set())
    with serving(run_dirs, port, every) as (server, _):
        bound = server.server_address[1]
        console.print(f"http://{HOST}:{bound}/", soft_wrap=True)
        console.print(
            f"Only this machine can open it; from another one: ssh -L {bound}:{HOST}:{bound} HERE. Ctrl-C ends it.",
            style="dim",
            soft_wrap=True,
        )
        stopped.wait()
    console.print("ended")


@contextmanager
def serving(
    run_dirs: Sequence[Path], port: int = 0, every: float = EVERY
) -> Iterator[tuple[ThreadingHTTPServer, list[Page]]]:
    """A server of these runs, until the block ends.

    Raises:
        UserError: the port is taken, or a path is a file.
    """
    for path in run_dirs:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: a file; name the directory of a run")
    with tempfile.TemporaryDirectory(prefix="mopd-watch-") as made:
        pages = [
            Page(name, [RunDirectory(path)], Path(made) / f"{number}.html", every)
            for number, (name, path) in enumerate(_names(run_dirs).items())
        ]
        if len(pages) > 1:
            runs = [run for page in pages for run in page.runs]
            pages.append(Page("all in one", runs, Path(made) / "all.html", every))
        try:
            server = ThreadingHTTPServer((HOST, port), _handler(pages))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; choose another, or leave it out") from error
        server.daemon_threads, server.block_on_close = True, False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield server, pages
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    names = [path.resolve().name for path in paths]
    return {name if names.count(name) == 1 else str(path): path for name, path in zip(names, paths, strict=True)}


@dataclass
class Page:
    """The report of one run or of several, as it could last be made."""

    name: str
    runs: Sequence[RunDirectory]
    file: Path
    """Where it is made, outside the runs."""
    every: float
    version: int = 0
    """Grows with each page that was made; 0: none yet."""
    html: bytes = b""
    trouble: str = ""
    """Why the latest page could not be made; the one before it stays."""
    text: str = ""
    """How far the run is."""
    _seen: Mapping[Path, tuple[int, int]] = field(default_factory=dict)
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def refresh(self) -> None:
        """Make the page again if its runs have changed, and enough time has passed."""
        with self._lock:
            if time.monotonic() < self._next:
                return
            began = time.monotonic()
            self._look()
            self._next = time.monotonic() + max(self.every, (time.monotonic() - began) / SHARE)

    def _look(self) -> None:
        try:
            there = [run for run in self.runs if run.config_file.is_file()]
            seen = {file: stamp for run in there for file, stamp in recorded_files(run).items()}
            if there and seen != self._seen:
                self._make(there)
                self._seen = seen
            waiting = [run.path for run in self.runs if run not in there]
            self.trouble = f"not there yet: {', '.join(map(str, waiting))}" if waiting else ""
        except Exception as error:
            # Files change while they are read, and a run may be damaged in any way: the page stays up.
            known = isinstance(error, UserError | DamagedError)
            self.trouble = f"not refreshed: {error if known else f'{type(error).__name__}: {error}'}"

    def _make(self, there: Sequence[RunDirectory]) -> None:
        from mopd_nemo.analysis.report import write_report

        text = _progress(there[0]) if len(there) == 1 else f"{len(there)} runs"
        self.html = write_report(there, self.file).read_bytes()
        self.text = text
        self.version += 1

    def state(self, now: float) -> dict[str, Any]:
        """What the browser is told."""
        changed = [stamp for file, (stamp, _) in self._seen.items() if file.name == "metrics.jsonl"]
        age = max(0.0, now - max(changed) / 1e9) if changed else None
        return {
            "name": self.name,
            "path": ", ".join(str(run.path) for run in self.runs),
            "version": self.version,
            "text": self.text,
            "trouble": self.trouble,
            "age": age,
        }


def recorded_files(run: RunDirectory) -> dict[Path, tuple[int, int]]:
    """The files that a report may read, each with its time in nanoseconds and its size.

    Raises:
        UserError: a link leads out of the run.
    """
    root = run.path.resolve()
    found = {}
    for directory in (run.path, run.rollouts, run.path / "teacher_signal"):
        if not directory.is_dir():
            continue
        if not directory.resolve().is_relative_to(root):
            raise UserError(f"{directory}: leads out of the run; it is not read")
        with os.scandir(directory) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_symlink() and not path.resolve().is_relative_to(root):
                    raise UserError(f"{path}: leads out of the run; it is not read")
                if entry.is_file() and path != run.report_file and not entry.name.startswith("."):
                    stat = entry.stat()
                    found[path] = (stat.st_mtime_ns, stat.st_size)
    return found


def _progress(run: RunDirectory) -> str:
    steps = run.read_config().train.num_steps
    rows = run.rows(run.metrics_file)
    if not rows:
        return "no step is done yet"
    last = rows[-1]["step"]
    return f"all {steps} steps done" if last >= steps else f"step {last} of {steps}"


def _handler(pages: Sequence[Page]) -> type[BaseHTTPRequestHandler]:
    """A handler of requests for these pages."""

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "mopd", ""
        timeout = 30

        def do_GET(self) -> None:
            if (hosts := self.headers.get_all("Host", [])) and len(hosts) == 1 and _host_name(hosts[0]) in NAMES:
                self._route(*self.path.partition("?")[::2])
            else:
                self._send(HTTPStatus.FORBIDDEN, f"open this page as http://{HOST}:PORT/", "text/plain")

        do_HEAD = do_GET

        def _route(self, path: str, query: str) -> None:
            if path == "/":
                self._send(HTTPStatus.OK, _SHELL.read_bytes(), "text/html")
            elif path == "/state.json":
                for number in parse_qs(query).get("page", []):
                    if (page := _page(pages, number)) is not None:
                        page.refresh()
                now = time.time()
                self._send(HTTPStatus.OK, json.dumps([page.state(now) for page in pages]), "application/json")
            elif (match := re.fullmatch(r"/page/(\d+)", path)) and (page := _page(pages, match[1])) is not None:
                self._send(HTTPStatus.OK, page.html, "text/html")
            else:
                self._send(HTTPStatus.NOT_FOUND, "no such page", "text/plain")

        def _refuse(self) -> None:
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, "this page can only be read", "text/plain")

        do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

        def _send(self, status: HTTPStatus, body: str | bytes, kind: str) -> None:
            data = body.encode() if isinstance(body, str) else body
            self.send_response(status)
            allowed = {"Allow": "GET, HEAD"} if status == HTTPStatus.METHOD_NOT_ALLOWED else {}
            sizes = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(data))}
            for name, value in (sizes | allowed | _HEADERS).items():
                self.send_header(name, value)
            with suppress(BrokenPipeError, ConnectionResetError):  # the reader has closed the page
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are no news."""

    return Handler


def _host_name(host: str) -> str:
    return re.sub(r":\d{1,5}$", "", host).lower()


def _page(pages: Sequence[Page], number: str) -> Page | None:
    return pages[int(number)] if re.fullmatch(r"[0-9]{1,4}", number) and int(number) < len(pages) else None
