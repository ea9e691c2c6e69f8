"""Shared fixtures: the embedded tokenizer, tiny random models, hand-written groups, real data where present."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads that wait for each other cost more than they give

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # where Triton is installed, its kernels then run on the CPU

import pytest
from hypothesis import settings

from mopd_nemo.chat import Chat
from mopd_nemo.engines.models import load_tokenizer
from mopd_nemo.types import Message, Outcome, Problem, Rollout, RolloutGroup, Verdict

settings.register_profile("suite", deadline=None, derandomize=True)  # the same examples on every machine, slow or not
settings.load_profile("suite")

EMBEDDED = Path(__file__).parent.parent / "mopd_nemo" / "embedded" / "arithmetic"
QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Of a Qwen3 of which no two are the same, in transformers' words."""


@pytest.fixture(scope="session")
def chat() -> Chat:
    """The embedded model's tokenizer and chat template."""
    return Chat(load_tokenizer(str(EMBEDDED), key="model.path"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real benchmark rows; tests skip without them."""
    path = Path(os.environ.get("MOPD_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set MOPD_SHARED_DATA to a folder with gsm8k/, sciknoweval/, toolalpaca/")
    return path


Mopd = Callable[..., tuple[int, str]]
"""The command `mopd`: given its arguments, exit code and all that it printed."""


@pytest.fixture
def mopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mopd:
    """The command in this process, as a shell would start it."""
    from mopd_nemo.cli import main

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mopd", *words])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed = capsys.readouterr()
        return code, f"{printed.out}\n{printed.err}"

    return run


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a randomly initialised Qwen3 and the embedded tokenizer."""
    return make_random_model(tmp_path_factory.mktemp("random-model"), seed=0)


def make_random_model(directory: Path, seed: int) -> Path:
    """Write a tiny random Qwen3 whose logits are spread out enough to tell tokens apart."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = load_tokenizer(str(EMBEDDED), key="model.path")
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.3,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_group(
    chat: Chat,
    responses: Sequence[tuple[str, float | None]],
    *,
    messages: Sequence[Message] = ({"role": "user", "content": "What is 7+5 modulo 10?"},),
    feedback: str = "",
) -> RolloutGroup:
    """A group from (response text, reward) pairs; reward None is a verifier error."""
    problem = Problem("p", tuple(messages), "2", "arithmetic", chat.prompt_ids(messages))
    rollouts, verdicts = [], []
    for text, reward in responses:
        ids = (*chat.encode(text), chat.tokenizer.eos_token_id)
        rollouts.append(Rollout(ids, text, True, (-0.5,) * len(ids)))
        if reward is None:
            verdicts.append(Verdict(0.0, Outcome.VERIFIER_ERROR))
        elif reward > 0.5:
            verdicts.append(Verdict(reward, Outcome.CORRECT, success=True))
        else:
            verdicts.append(Verdict(reward, Outcome.WRONG, feedback=feedback, success=reward >= 0.5))
    return RolloutGroup(problem, tuple(rollouts), tuple(verdicts))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")
