"""`mopd estimate`, and the estimate in `mopd train --dry-run`."""

from pathlib import Path

import pytest

from mopd_nemo import outlook
from mopd_nemo.commands import estimate
from tests.conftest import QUICKSTART, Mopd

CLUSTER = Path(__file__).parents[2] / "configs/paper/mopd-qwen3-8b-livecodebench-1n8g-tp2.yaml"


def test_parts_by_phase_and_whether_they_fit(mopd: Mopd) -> None:
    code, text = mopd("estimate", "--config", str(QUICKSTART), "--card", "0.5")
    assert code == 0
    for word in ("generate", "optimiser step", "KV cache", "activations", "teacher's states", "fits: 0."):
        assert word.replace(" step", "") in text, text
    code, text = mopd("estimate", "--config", str(QUICKSTART), "--card", "0.01")
    assert code == 0 and "update may need" in text and "fits" not in text
    assert "what helps, in GB" in text and "train.activation_checkpointing=true" in text
    code, text = mopd("estimate", "--config", str(QUICKSTART), "--card", "0.01", "train.activation_checkpointing=true")
    assert code == 0 and "train.activation_checkpointing=true" not in text, "it is set"


def test_where_no_setting_helps_it_says_so(mopd: Mopd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_remedies", lambda _: ["rollout.batch_size=100000", "no.such=setting"])
    code, text = mopd("estimate", "--config", str(QUICKSTART), "--card", "0.01")
    assert code == 0 and "no setting helps: choose a smaller model" in text


def test_a_cluster_and_a_card_by_name(mopd: Mopd) -> None:
    code, text = mopd("estimate", "--config", str(CLUSTER), "--card", "h100")
    assert code == 0 and "GB on the fullest GPU of 80 GB" in text and "optimiser" in text and "vLLM" in text
    code, text = mopd("estimate", "--config", str(CLUSTER))
    assert code == 2 and "--card here: engine=nemo is not on this machine" in text


def test_host_memory_is_said_where_it_is_not_the_devices(mopd: Mopd, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--config", str(QUICKSTART), "teacher.offload=true", "model.path=Qwen/Qwen3-8B")
    code, text = mopd("estimate", *words, "--card", "H200")
    assert code == 0 and "and 32.8 GB of host memory for what is offloaded" in text and "teacher's head" in text
    code, text = mopd("estimate", *words, "model.device=cpu")
    assert code == 0 and "of host memory" not in text and "on the host" in text
    monkeypatch.setattr(outlook, "_device", lambda _: "cuda:0")
    monkeypatch.setattr(outlook, "free_memory", lambda _: 80_000_000_000)
    code, text = mopd("train", "--config", str(QUICKSTART), "teacher.offload=true", "--dry-run")
    assert code == 0 and "of host memory for what is offloaded; " in text, text


@pytest.mark.parametrize("card", ["H1000", "-3", "nan", "inf"])
def test_an_unknown_card(mopd: Mopd, card: str) -> None:
    code, text = mopd("estimate", "--config", str(QUICKSTART), f"--card={card}")
    assert code == 2 and f"--card {card}: give one of" in text


def test_a_model_of_unknown_sizes(mopd: Mopd, tmp_path: Path) -> None:
    code, text = mopd("estimate", "--config", str(QUICKSTART), f"model.path={tmp_path}", "--card", "24")
    assert code == 2 and f"model.path={tmp_path}: sizes are unknown" in text


def test_a_dry_run_says_what_may_not_fit_and_refuses_what_cannot(mopd: Mopd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlook, "free_memory", lambda _: 60_000_000)
    code, text = mopd("train", "--config", str(QUICKSTART), "--dry-run")
    assert code == 0 and "at most, in update; 60 MB are free" in text and "update may need" in text, text
    monkeypatch.setattr(outlook, "free_memory", lambda _: 5_000_000)
    code, text = mopd("train", "--config", str(QUICKSTART), "--dry-run")
    assert code == 2 and "weights, gradients, optimiser and teacher take" in text
