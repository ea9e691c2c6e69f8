"""The served judge of the examples, as docs/verifiers.md starts it, in a run."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mopd_nemo.files import read_rows
from tests.test_trainer import new_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    judge = subprocess.Popen(
        [sys.executable, str(ROOT / "examples/served_judge.py"), str(port)],
        env=os.environ,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.05)
    yield f"http://127.0.0.1:{port}/verdict"
    judge.kill()
    judge.wait()


def test_it_judges_a_run_that_learns(url: str, tmp_path: Path) -> None:
    data = tmp_path / "problems.jsonl"
    rows = [{"id": str(n), "prompt": f"{n}+1?", "answer": [str(n + 1), "boxed"], "task": "words"} for n in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    served = f"verifier.http={{words: {{url: '{url}', token_env: JUDGE_TOKEN}}}}"
    settings = [f"data.train={data}", "train.num_steps=2", "train.eval_every=0", "verifier.success_threshold=1.0"]
    run = new_run(tmp_path / "run", *settings, served)
    first = read_rows(run.metrics_file)[0]
    assert first["outcome/verifier_error"] == 0.0 and 0.0 < first["reward"] < 1.0
    for file in run.path.rglob("*"):
        assert not file.is_file() or b"s3cret" not in file.read_bytes(), file
