"""`mopd export` and `mopd chat`: which checkpoint, what the card says, and a hub on loopback that takes the upload."""

import base64
import http.server
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from mopd_nemo.commands.export import trained
from mopd_nemo.config import UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.files import read_rows, write_rows
from mopd_nemo.run.directory import RunDirectory
from tests.conftest import EMBEDDED, QUICKSTART, Mopd

SMALL = [
    *("rollout.num_prompts_per_step=2", "rollout.num_rollouts_per_prompt=4", "data.num_train=8", "data.num_eval=4"),
    *("eval.num_samples=2", "train.num_steps=3", "train.eval_every=1", "train.checkpoint_every=1"),
    *("train.keep_checkpoints=9", "logging.wandb_project=SECRET"),
]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with three checkpoints and evaluations, of which the second is made the best."""
    path = tmp_path_factory.mktemp("export") / "run"
    from rich.console import Console

    from mopd_nemo.trainer import Trainer

    Trainer.new(load_config(QUICKSTART, [*SMALL, f"run_dir={path}"]), Console(file=io.StringIO()), None).fit()
    run = RunDirectory(path)
    rows = read_rows(run.eval_file)
    for row, mean in zip(rows, (0.25, 0.5, 0.875, 0.5), strict=True):
        row |= {"mean@2": mean, "mean@2/low": mean - 0.125, "mean@2/high": mean + 0.125}
    write_rows(run.eval_file, rows)
    return path


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> RunDirectory:
    """A copy to damage."""
    return RunDirectory(Path(shutil.copytree(trained_run, tmp_path / "run")))


def test_the_best_checkpoint_is_taken_or_the_one_that_is_named(run: RunDirectory) -> None:
    assert trained(run.path).step == 2 and ", the best evaluated one" in trained(run.path).why
    assert trained(run.path, "newest").step == 3
    assert trained(run.path, "1").step == 1
    assert trained(run.checkpoints / "step_000001").step == 1
    assert trained(EMBEDDED).run is None
    with pytest.raises(UserError, match="--checkpoint 7: choose best, newest or a step with a checkpoint: 1, 2, 3"):
        trained(run.path, "7")


def test_a_damaged_checkpoint_is_passed_over(run: RunDirectory) -> None:
    (run.checkpoints / "step_000002" / "model.safetensors").write_bytes(b"")
    assert trained(run.path).step == 1  # evaluated as well as step 3, and earlier
    with pytest.raises(UserError, match="a step with a checkpoint: 1, 3"):
        trained(run.path, "2")


def test_without_evaluations_the_newest_is_taken(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    run.eval_file.unlink()
    assert trained(run.path).step == 3 and "none was evaluated" in trained(run.path).why
    code, _ = mopd("export", str(run.path), "-o", str(tmp_path / "model"))
    assert code == 0 and "This checkpoint was not evaluated." in (tmp_path / "model" / "README.md").read_text()


def test_checkpoints_without_the_rest_of_their_run_are_enough(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    run.config_file.unlink()
    assert trained(run.path).step == 3 and trained(run.checkpoints / "step_000001").run is None
    assert mopd("export", str(run.path), "-o", str(tmp_path / "model"))[0] == 0
    assert not (tmp_path / "model" / "README.md").exists()


def test_a_run_whose_settings_this_version_does_not_know_is_still_a_model(
    run: RunDirectory, mopd: Mopd, tmp_path: Path
) -> None:
    run.config_file.write_text(run.config_file.read_text() + "of_an_older_version: 1\n")
    code, printed = mopd("export", str(run.path), "-o", str(tmp_path / "model"))
    assert code == 0 and "no records of the run are used" in printed and "of_an_older_version" in printed
    assert not (tmp_path / "model" / "README.md").exists()


def test_a_checkpoint_of_the_cluster_engine_has_a_card_too(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    """In the form that NeMo-RL's DTensor worker writes."""
    checkpoint = run.checkpoints / "step_000002"
    inside = checkpoint / "policy" / "weights" / "model"
    inside.mkdir(parents=True)
    (checkpoint / "policy" / "tokenizer").mkdir()
    (checkpoint / "policy" / "config.yaml").write_text("policy: {}\n")
    for file in [file for file in checkpoint.iterdir() if file.is_file()]:
        place = checkpoint / "policy" / "tokenizer" if "token" in file.name or "chat" in file.name else inside
        file.rename(place / file.name)
    output = tmp_path / "model"
    code, printed = mopd("export", str(checkpoint), "-o", str(output))
    assert code == 0, printed
    assert "87.5%" in (output / "README.md").read_text() and (output / "tokenizer.json").is_file()
    code, printed = mopd("chat", str(checkpoint))
    assert code == 2 and f"first `mopd export {checkpoint} --output DIR`" in printed


def test_an_export_is_a_model_with_a_card_and_nothing_else(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    output = tmp_path / "model"
    (run.checkpoints / "step_000003" / "rollouts.jsonl").write_text("{}\n")  # of rollouts in flight
    code, printed = mopd("export", str(run.path), "-o", str(output), "--checkpoint", "3")
    assert code == 0, printed
    names = {file.name for file in output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "mopd.yaml"} <= names
    assert not names & {"manifest.json", "trainer.json", "optimizer.pt", "teacher", "rollouts.jsonl"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(output)
    AutoTokenizer.from_pretrained(output)


def test_the_card_has_the_runs_own_figures(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    output = tmp_path / "model"
    assert mopd("export", str(run.path), "-o", str(output))[0] == 0
    card = (output / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mopd-nemo", "mopd", "on-policy-distillation"],
    }
    assert "| mean@2 | 25.0% (12.5% to 37.5%) | 87.5% (75.0% to 100.0%) |" in text
    assert "the best of 4 evaluations" in text and "4 held-out problems" in text
    assert "2 successes and 0 failures" in text and "learning rate 0.0001, seed 0" in text
    rows = read_rows(run.metrics_file)
    assert len(rows) == 3 and "- 2 steps in 0:00:" in text, "of the steps up to this checkpoint"
    assert "- 20" in text and ", from step 0: CPU" in text and "torch 2" in text and "transformers" in text
    assert "SECRET" not in card + (output / "mopd.yaml").read_text() and str(run.path) not in text
    here = run.read_config()
    again = load_config(output / "mopd.yaml")
    private = {"name": here.name, "run_dir": here.run_dir, "cluster": here.cluster, "logging": here.logging}
    assert again.model_copy(update=private) == here


def test_a_card_says_what_is_wrong(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    rows = read_rows(run.metrics_file)
    write_rows(run.metrics_file, [row | {"outcome/verifier_error": 0.25} for row in rows])
    config = run.read_config()
    model = config.model.model_copy(update={"path": "some-lab/some-model"})
    run.write_config(config.model_copy(update={"model": model}))
    mopd("export", str(run.path), "-o", str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "25.00% of the training responses could not be judged" in card
    assert "base_model: some-lab/some-model\n" in card


def test_end_tokens_of_training_end_responses_elsewhere(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    config = run.read_config()
    tokens = json.loads((run.checkpoints / "step_000003" / "tokenizer.json").read_text())["added_tokens"]
    extra = tokens[0]
    run.write_config(
        config.model_copy(update={"model": config.model.model_copy(update={"end_tokens": (extra["content"],)})})
    )
    assert mopd("export", str(run.path), "-o", str(tmp_path / "model"))[0] == 0
    before = json.loads((run.checkpoints / "step_000003" / "generation_config.json").read_text())["eos_token_id"]
    now = json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert now == list(dict.fromkeys([before, extra["id"]]))


# ---- a hub


class Hub:
    """The part of a hub's HTTP interface that an upload uses, with what it was given."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.repos: list[dict[str, Any]] = []
        self.forbidden = False
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, value = hub.answer(self.command, self.path, self.headers.get("Authorization"), body)
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        if path.startswith("/upload/"):
            self.objects[path.removeprefix("/upload/")] = body
            return 200, {}
        if path == "/api/whoami-v2":
            return (200, {"name": "me", "type": "user"}) if token == "Bearer hf_right" else (401, {"error": "no"})
        if path == "/api/repos/create":
            self.repos.append(json.loads(body))
            return (403, {"error": "not yours"}) if self.forbidden else (200, {"url": f"{self.address}/me/model"})
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            kind = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": kind[n], "shouldIgnore": False} for n in names]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.address}/upload/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                if item["key"] == "lfsFile":
                    self.files[item["value"]["path"]] = self.objects[item["value"]["oid"]]
            return 200, {"commitUrl": f"{self.address}/me/model/commit/1", "commitOid": "1", "commitMessage": ""}
        return 404, {"error": f"{method} {path}"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    started = Hub()
    yield started
    started.server.shutdown()
    started.server.server_close()


def is_private(repo: dict[str, Any]) -> bool:
    """As older clients and newer ones ask for it."""
    return repo.get("private") is True or repo.get("visibility") == "private"


def push(hub: Hub, *words: str, token: str = "hf_right") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where the hub's own client reads these variables."""
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "mopd_nemo", "export", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_push_uploads_the_whole_model_as_a_private_one(hub: Hub, run: RunDirectory, tmp_path: Path) -> None:
    done = push(hub, str(run.path), "--output", str(tmp_path / "model"), "--push", "me/model")
    assert done.returncode == 0, done.stderr
    assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert hub.repos[0]["name"] == "model" and is_private(hub.repos[0])
    assert f"{hub.address}/me/model: the model of" in done.stdout
    assert "# model\n" in hub.files["README.md"].decode()


def test_a_public_push_alone_leaves_nothing_here(hub: Hub, run: RunDirectory) -> None:
    before = sorted(run.path.rglob("*"))
    done = push(hub, str(run.path), "--push", "me/model", "--public")
    assert done.returncode == 0, done.stderr
    assert not is_private(hub.repos[0]) and "model.safetensors" in hub.files
    assert sorted(run.path.rglob("*")) == before


def test_what_a_hub_refuses_is_said_before_the_work(hub: Hub, run: RunDirectory, tmp_path: Path) -> None:
    output = str(tmp_path / "model")
    wrong = push(hub, str(run.path), "-o", output, "--push", "me/model", token="hf_wrong")
    assert wrong.returncode == 2 and "log in with `hf auth login`" in wrong.stderr and not Path(output).exists()
    hub.forbidden = True
    refused = push(hub, str(run.path), "--push", "them/model")
    assert refused.returncode == 2 and "use a token that may write there" in refused.stderr
    hub.server.shutdown()
    hub.server.server_close()
    gone = push(hub, str(run.path), "--push", "me/model")
    assert gone.returncode == 2 and "--push me/model: " in gone.stderr and "Traceback" not in gone.stderr


# ---- talking to it

ASKED = "What is 7+5 modulo 10?"


def talk(*words: str, said: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mopd_nemo", "chat", *words]
    return subprocess.run(command, input=said, capture_output=True, text=True, check=False)


def test_piped_lines_are_answered_on_stdout_alone(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    """A run, its checkpoint, an export of it and the same seed say the same."""
    mopd("export", str(run.path), "-o", str(tmp_path / "model"))
    places = [str(run.path), str(run.checkpoints / "step_000002"), str(tmp_path / "model")]
    answers = [talk(place, "--seed", "3", said=f"{ASKED}\n\n/new\n{ASKED}") for place in places]
    assert {answer.returncode for answer in answers} == {0}
    assert len({answer.stdout for answer in answers}) == 1
    first, second = answers[0].stdout[: len(answers[0].stdout) // 2], answers[0].stdout[len(answers[0].stdout) // 2 :]
    assert first == second and "boxed" in first
    assert "step_000002, the best evaluated one" in answers[0].stderr


def test_answers_are_cut_where_they_must_be(run: RunDirectory) -> None:
    done = talk(str(run.path), "--max-tokens", "3", "--temperature", "0", said=ASKED)
    assert done.returncode == 0 and "[cut after 3 tokens: --max-tokens 3]" in done.stderr
    full = talk(str(run.path), said=ASKED * 500)
    assert full.returncode == 2 and "positions of the model" in full.stderr


def test_a_model_that_is_not_there_is_named() -> None:
    done = talk("/none/model", said="")
    assert done.returncode == 2 and "/none/model: no such directory" in done.stderr


def test_ctrl_c_cuts_an_answer_and_ctrl_d_ends(run: RunDirectory) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mopd_nemo", "chat", str(run.path), "--max-tokens", "500", "--temperature", "5"]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    os.close(theirs)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 4096)

    try:
        until(b"> ")
        os.write(ours, ASKED.encode() + b"\n")
        until(ASKED.encode() + b"\r\n")
        seen = seen.partition(ASKED.encode() + b"\r\n")[2]
        while len(seen) < 3:  # the answer has begun
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 4096)
        os.kill(process.pid, signal.SIGINT)
        until(b"[cut short]")
        seen = seen.partition(b"[cut short]")[2]
        until(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(ours)
