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
    assert code == 2 and f"model.path={tmp_path}: its sizes are unknown" in text
    words = ("--config", str(QUICKSTART), "method=opd", f"teacher.path={tmp_path}", "--card", "24")
    code, text = mopd("estimate", *words)
    assert code == 2 and f"error: teacher.path={tmp_path}: its sizes are unknown" in text


def test_a_card_that_the_estimate_just_fills(mopd: Mopd) -> None:
    code, text = mopd("estimate", "--config", str(QUICKSTART), "--card", "0.135")
    assert code == 0 and "fits, barely: 0.00" in text and "may be a tenth too low" in text


def test_settings_that_help_little_are_said_to_be_too_little(mopd: Mopd) -> None:
    words = ("--config", str(QUICKSTART), "model.path=Qwen/Qwen3-32B", "--card")
    assert "none is enough alone: set several" in mopd("estimate", *words, "24")[1]
    assert "none is enough alone" not in mopd("estimate", *words, "300")[1]


@pytest.mark.parametrize("command", [("estimate", "--card", "24"), ("train", "--dry-run")])
def test_layers_that_a_model_does_not_have(mopd: Mopd, command: tuple[str, ...]) -> None:
    words = ("--config", str(QUICKSTART), "lora.rank=4", "lora.targets=[q_proj,nosuch]")
    code, text = mopd(*command, *words)
    assert code == 2 and "lora.targets=[nosuch, q_proj]: the linear layers of embedded:arithmetic are down_proj" in text


def test_a_layer_by_a_longer_name_is_counted(mopd: Mopd) -> None:
    texts = [
        mopd("estimate", "--config", str(QUICKSTART), "--card", "24", "lora.rank=4", f"lora.targets=[{name}]")[1]
        for name in ("q_proj", "self_attn.q_proj")
    ]
    assert texts[0] == texts[1] and "gradients" in texts[0]


def test_a_dry_run_says_what_may_not_fit_and_refuses_what_cannot(mopd: Mopd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlook, "free_memory", lambda _: 60_000_000)
    code, text = mopd("train", "--config", str(QUICKSTART), "--dry-run")
    assert code == 0 and "at most, in update; 60 MB are free" in text and "update may need" in text, text
    monkeypatch.setattr(outlook, "free_memory", lambda _: 5_000_000)
    code, text = mopd("train", "--config", str(QUICKSTART), "--dry-run")
    assert code == 2 and "weights, gradients, optimiser and teacher take" in text
