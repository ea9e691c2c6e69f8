"""Names of models that are not here: told at once, not after the hub's library has tried for more than a minute."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from mopd_nemo.config import UserError
from mopd_nemo.engines import models
from mopd_nemo.engines.models import check_directory

UNREACHABLE = "no such directory, and no model that was fetched from the hub before; http.* cannot be reached"


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A hub that knows no model, and says so."""

    class Missing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Missing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(models, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(models, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        models._hub_answers.cache_clear()
        yield server
        server.shutdown()
    models._hub_answers.cache_clear()


@pytest.mark.parametrize("name", ["NOPE", "owner/nope-1b"])
def test_a_name_is_left_to_the_hub_where_it_answers(name: str, hub: ThreadingHTTPServer) -> None:
    check_directory(name, "model.path")
    models._hub_answers.cache_clear()
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match=f"model.path={name}: {UNREACHABLE}"):
        check_directory(name, "model.path")


def test_offline_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"DIR=owner/nope: {UNREACHABLE}"):
        check_directory("owner/nope", "DIR")


def test_what_the_cache_has_needs_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda name, file: str(tmp_path / name / file))
    check_directory("owner/fetched", "model.path")
    check_directory("embedded:arithmetic", "model.path")
