"""Runs with adapters as a user makes them: every method, killed and continued, evaluated, exported."""

import io
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mopd_nemo.config.plugins import METHODS
from mopd_nemo.files import read_rows
from mopd_nemo.run.checkpoints import checkpoints
from mopd_nemo.run.directory import RunDirectory
from tests.conftest import QUICKSTART, Mopd
from tests.test_trainer import SMALL, finish_through_kills, new_run, start, without_times

LORA = ["lora.rank=4", "optimizer.learning_rate=1e-3"]
LAGGING = [*LORA, "lora.dropout=0.1", "rollout.lag=1"]
EMBEDDED = "embedded:arithmetic"


def adapters(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run.checkpoints)[-1] / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with adapters, of which some inputs are dropped, an EMA of them, and rollouts in flight at every moment."""
    return new_run(tmp_path_factory.mktemp("lora") / "run", *LAGGING)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_adapters(method: str, mopd: Mopd, tmp_path: Path) -> None:
    settings = [f"method={method}", *LORA, "train.num_steps=2", "train.eval_every=0"]
    if method in ("opd", "gkd"):
        settings.append(f"teacher.path={EMBEDDED}")
    if method == "gkd":
        asked = [word for word in SMALL if not word.startswith("peers.")]
        words = ("--config", str(QUICKSTART), "--output", str(tmp_path / "completions.jsonl"), *asked, *settings)
        code, printed = mopd("complete", *words)
        assert code == 0, printed
        settings.append(f"gkd.completions={tmp_path / 'completions.jsonl'}")
    small = [word for word in SMALL if word.split("=")[0] not in {item.split("=")[0] for item in settings}]
    run = RunDirectory(tmp_path / "run")
    small = small if method == "mopd" else [word for word in small if not word.startswith("peers.")]
    code, printed = mopd("train", "--config", str(QUICKSTART), f"run_dir={run.path}", *small, *settings)
    assert code == 0, printed
    rows = read_rows(run.metrics_file)
    assert [row["step"] for row in rows] == [1, 2]
    assert any(row["update/skipped"] == 0 for row in rows)
    assert any(bool(weights.any()) for key, weights in adapters(run).items() if "lora_B" in key)


def test_a_killed_run_continues_bit_for_bit(run: RunDirectory, tmp_path: Path) -> None:
    killed = RunDirectory(tmp_path / "run")
    process = start("--config", str(QUICKSTART), f"run_dir={killed.path}", *SMALL, *LAGGING)
    finish_through_kills(process, killed, {3: "", 5: ""})
    for name in ("metrics_file", "eval_file"):
        assert without_times(run.rows(getattr(run, name))) == without_times(killed.rows(getattr(killed, name)))
    for part in ("adapter_model.safetensors", "teacher/adapter_model.safetensors"):
        first, second = (load_file(checkpoints(one.checkpoints)[-1] / part) for one in (run, killed))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_holds_little_more_than_adapters(run: RunDirectory) -> None:
    checkpoint = checkpoints(run.checkpoints)[-1]
    weights = sum(tensor.numel() for tensor in adapters(run).values()) * 4
    written = sum(f.stat().st_size for f in checkpoint.rglob("*") if f.suffix in (".safetensors", ".pt"))
    assert written < 4 * weights + 200_000, "adapters, two averages, and the EMA"


def test_an_export_is_adapters_or_a_whole_model(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    ids = torch.arange(5, 25).unsqueeze(0)
    found = {}
    for name, words in (("adapters", ()), ("whole", ("--merge",))):
        code, printed = mopd("export", str(run.path), "-o", str(tmp_path / name), "--checkpoint", "newest", *words)
        assert code == 0, printed
        files = {file.name for file in (tmp_path / name).iterdir()}
        assert not files & {"manifest.json", "trainer.json", "optimizer.pt", "teacher"}
        assert ("model.safetensors" in files) == (name == "whole")
        assert ("adapter_config.json" in files) == (name == "adapters")
        loader = AutoModelForCausalLM if name == "whole" else AutoPeftModelForCausalLM
        with torch.no_grad():
            found[name] = loader.from_pretrained(tmp_path / name)(input_ids=ids).logits
    assert torch.allclose(found["adapters"], found["whole"], atol=1e-5 * found["whole"].abs().max().item())


def test_commands_take_a_checkpoint_of_adapters(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    checkpoint, last = checkpoints(run.checkpoints)[-1], run.rows(run.eval_file)[-1]
    answer = tmp_path / "eval.json"
    small = [word for word in SMALL if word.startswith(("data.", "eval."))]
    code, printed = mopd(
        *("eval", "--config", str(QUICKSTART), "--checkpoint", str(checkpoint), "--output", str(answer)), *small, *LORA
    )
    assert code == 0, printed
    assert json.loads(answer.read_text())["mean@2"] == last["mean@2"]
    code, printed = mopd("inspect", str(run.path), "--tokens")
    assert code == 0, printed


def test_what_was_trained_answers(run: RunDirectory, mopd: Mopd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 7+5 modulo 10?\n"))
    code, printed = mopd("chat", str(run.path), "--max-tokens", "8", "--temperature", "0")
    assert code == 0, printed


def test_a_directory_of_adapters_is_a_model_to_train(run: RunDirectory, mopd: Mopd, tmp_path: Path) -> None:
    """All of its weights: PEFT leaves what it merges frozen."""
    whole = [f"model.path={checkpoints(run.checkpoints)[-1]}", "train.num_steps=1", "train.eval_every=0"]
    small = [word for word in SMALL if word.split("=")[0] not in {item.split("=")[0] for item in whole}]
    after = RunDirectory(tmp_path / "run")
    code, printed = mopd("train", "--config", str(QUICKSTART), f"run_dir={after.path}", *small, *whole)
    assert code == 0, printed
    assert after.rows(after.metrics_file)[0]["update/skipped"] == 0
    trained = load_file(checkpoints(after.checkpoints)[-1] / "model.safetensors")
    code, printed = mopd("export", str(run.path), "-o", str(tmp_path / "whole"), "--checkpoint", "newest", "--merge")
    assert code == 0, printed
    before = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(bool((before[name] != weights).any()) for name, weights in trained.items())
