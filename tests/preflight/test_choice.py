"""A run's choice of peers with planted models: what is chosen, when, and that it can be repeated."""

from typing import Any

import pytest

from mopd_nemo.chat import Chat, with_prompt_ids
from mopd_nemo.config import Config, PeersConfig, UserError
from mopd_nemo.config.load import load_config
from mopd_nemo.preflight.choice import check_choice, choose, chosen_peers, due
from mopd_nemo.verifiers.pool import VerifierPool
from tests.conftest import QUICKSTART
from tests.preflight.planted import PlantedEngine, arithmetic

MEASURED = [
    "peers.choose=measured",
    "peers.choose_problems=24",
    "rollout.num_prompts_per_step=8",
    "peers.choose_every=5",
]


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, [*MEASURED, *overrides])


def chosen(chat: Chat, settings: Config, step: int = 0, **habits: float) -> dict[str, Any]:
    problems = with_prompt_ids(arithmetic(64), chat, 128)
    engine: Any = PlantedEngine(chat, problems, **habits)
    with VerifierPool(settings.verifier, {"arithmetic"}) as verifiers:
        return choose(step, problems, engine, verifiers, settings)


def test_successes_only_for_a_model_that_copies_failures(chat: Chat) -> None:
    row = chosen(chat, config(), success=0.9, both=0.2)
    assert (row["step"], row["context"], row["clear"]) == (0, "1s", True)
    assert any("copies failures" in sentence for sentence in row["sentences"])
    metrics = row["metrics"]
    assert metrics["choice/1s/chosen"] == 1.0 and metrics["choice/2s+1f/chosen"] == 0.0
    assert metrics["choice/1s/gain/low"] > 0 > metrics["choice/2s+1f/gain/high"]
    peers = chosen_peers(row, PeersConfig(max_peer_tokens=7))
    assert (peers.successes, peers.failures, peers.max_peer_tokens) == (1, 0, 7)


def test_the_least_harm_is_chosen_and_said_where_nothing_helps(chat: Chat) -> None:
    row = chosen(chat, config(), alone=0.6, success=0.3, both=0.05)
    assert row["context"] in ("1s", "2s") and not row["clear"]
    assert "Every context harms this model. The least harm" in row["sentences"][0]


def test_the_configs_own_peers_stay_where_too_few_problems_tell(chat: Chat) -> None:
    row = chosen(chat, config("peers.successes=2", "peers.failures=0"), alone=1.0)
    assert row["context"] == "2s" and row["sentences"][0].startswith("Cannot tell: 0 problems")


def test_the_same_step_measures_the_same_and_another_draws_anew(chat: Chat) -> None:
    first, again, later = (chosen(chat, config(), step) for step in (0, 0, 5))
    assert first | {"seconds": 0} == again | {"seconds": 0}
    assert first["figures"]["contexts"]["1s"]["right"] != later["figures"]["contexts"]["1s"]["right"]


def test_when_a_choice_is_due() -> None:
    settings = config("train.num_steps=10")
    assert [step for step in range(12) if due(settings, step)] == [0, 5]
    assert [step for step in range(12) if due(config("peers.choose_every=0"), step)] == [0]
    assert not due(load_config(QUICKSTART), 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peers.choose_from=[1s,2x]"], "context '2x'"),
        (
            ["rollout.num_rollouts_per_prompt=3"],
            "context 2s\\+1f needs 3 peers .* leave 2s\\+1f out of peers.choose_from",
        ),
        (["teacher.kind=external", "teacher.path=x"], "teacher.kind=external is another model"),
        (["peers.control=random_peer"], "peers.control=random_peer: choose one of the two"),
        (["peers.choose=fixed"], "peers.choose_every=5 is unused by peers.choose=fixed"),
    ],
)
def test_what_cannot_be_measured_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_choice(config(*overrides))
