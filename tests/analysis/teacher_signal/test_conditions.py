"""The conditions show what training would show."""

import pytest

from mopd_nemo.analysis.teacher_signal.conditions import CONDITIONS, ConditionContext, condition_contexts
from mopd_nemo.chat import Chat
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.render import build_contexts
from mopd_nemo.types import RolloutGroup
from tests.conftest import make_group

MANY = [("ab \\boxed{2}", 1.0), ("cd", 0.0), ("ef \\boxed{2}", 1.0), ("gh", 0.0), ("ij \\boxed{2}", 1.0), ("kl", 0.0)]
TRAINED = {
    "1S": {"successes": 1, "failures": 0},
    "1F": {"successes": 0, "failures": 1},
    "1S+1F": {"successes": 1, "failures": 1},
    "2S+1F": {"successes": 2, "failures": 1},
    "all": {"successes": "all", "failures": "all"},
    "random_peer": {"successes": 2, "failures": 1, "control": "random_peer"},
    "unrelated_prompt": {"successes": 2, "failures": 1, "control": "unrelated_prompt"},
    "success_only": {"successes": 2, "failures": 1, "control": "success_only"},
}


@pytest.fixture
def groups(chat: Chat) -> list[RolloutGroup]:
    other = ({"role": "user", "content": "What is 1+1?"},)
    return [
        make_group(chat, MANY),
        make_group(chat, [(f"other {text}", reward) for text, reward in MANY], messages=other),  # type: ignore[arg-type]
    ]


def contexts_of(groups: list[RolloutGroup], chat: Chat, **settings: object) -> dict[str, list[list[ConditionContext]]]:
    return condition_contexts(groups, chat, PeersConfig.model_validate(settings), "seed")


@pytest.mark.parametrize("order", ["canonical", "random", "shortest", "diverse"])
@pytest.mark.parametrize("name", TRAINED)
def test_same_prompts_as_in_training(groups: list[RolloutGroup], chat: Chat, name: str, order: str) -> None:
    config = PeersConfig.model_validate({**TRAINED[name], "order": order})
    trained = build_contexts(groups, chat, config, "seed")
    for mine, theirs in zip(contexts_of(groups, chat, order=order)[name], trained, strict=True):
        assert [item.context.prompt_ids for item in mine] == [context.prompt_ids for context in theirs]


def test_none_is_the_students_prompt_and_second_success_is_the_second(groups: list[RolloutGroup], chat: Chat) -> None:
    contexts = contexts_of(groups, chat)
    assert all(
        item.context.prompt_ids == groups[0].problem.prompt_ids and item.complete for item in contexts["none"][0]
    )
    failure = contexts["2nd S"][0][1].context
    assert [peer.rollout_index for peer in failure.selection.peers] == [2]
    assert [peer.rollout_index for peer in contexts["1S"][0][1].context.selection.peers] == [0]
    assert [peer.rollout_index for peer in contexts["2nd S"][0][0].context.selection.peers] == [4]


def test_what_is_missing_is_said(chat: Chat) -> None:
    lone = make_group(chat, [("ab \\boxed{2}", 1.0), ("cd", 0.0), ("ef", 0.0)])
    contexts = {name: groups[0] for name, groups in contexts_of([lone], chat).items()}
    assert set(contexts) == set(CONDITIONS)
    assert [item.complete for item in contexts["1S"]] == [False, True, True]
    assert contexts["1S"][0].context.prompt_ids == lone.problem.prompt_ids, "nothing to show: the plain prompt"
    assert [item.complete for item in contexts["1S+1F"]] == [False, True, True]
    assert not any(item.complete for item in contexts["2S+1F"])
    assert not any(item.complete for item in contexts["unrelated_prompt"]), "there is no other problem"
    assert all(item.complete for item in contexts["1F"])


def test_contexts_that_do_not_fit_have_no_prompt(groups: list[RolloutGroup], chat: Chat) -> None:
    contexts = contexts_of(groups, chat, max_context_tokens=60)
    assert contexts["2S+1F"][0][0].context.prompt_ids is None
    assert contexts["none"][0][0].context.prompt_ids is not None
