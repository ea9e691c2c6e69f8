from dataclasses import replace

import pytest

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, PeersConfig, UserError
from mopd_nemo.peers.render import build_contexts
from mopd_nemo.preflight.contexts import (
    PLAIN,
    counts_of,
    label_of,
    name_of,
    parse_contexts,
    peers_of,
    settings_of,
    survey,
)
from tests.conftest import make_group


@pytest.mark.parametrize(
    ("name", "counts", "label"),
    [
        ("1s", (1, 0), "1 success"),
        ("2s", (2, 0), "2 successes"),
        ("1f", (0, 1), "1 failure"),
        ("2s+1f", (2, 1), "2 successes + 1 failure"),
        ("12s+3f", (12, 3), "12 successes + 3 failures"),
        ("alls+1f", ("all", 1), "all successes + 1 failure"),
        ("all", ("all", "all"), "all peers"),
        ("1s+1f:contrast", (1, 1), "1 success + 1 failure (contrast)"),
        ("all:described", ("all", "all"), "all peers (described)"),
    ],
)
def test_a_name_says_what_is_shown(name: str, counts: tuple[object, object], label: str) -> None:
    assert counts_of(name) == counts and label_of(name) == label
    shown = peers_of(name, PeersConfig())
    assert (shown.successes, shown.failures) == counts and name_of(shown) == name


@pytest.mark.parametrize(
    "text", ["", ",", "s", "0s", "1s1f", "1f+1s", "2s+", "1x", "1s+1f+1f", "none", "1s:contrast", "1f:no"]
)
def test_what_is_no_context_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="context"):
        parse_contexts(text)


def test_a_list_keeps_its_order_and_drops_repeats() -> None:
    assert parse_contexts(" 2s+1f, 1S,,2s+1f") == ("2s+1f", "1s")


def test_the_config_decides_all_but_the_context() -> None:
    config = PeersConfig(failures=1, failure_form="contrast", max_peer_tokens=7)
    assert peers_of("1s+1f", config) == PeersConfig(successes=1, failures=1, max_peer_tokens=7)
    described = {"successes": 1, "failures": 1, "failure_form": "described"}
    assert settings_of("1s+1f:described", PeersConfig()) == described
    assert settings_of("2s", PeersConfig()) == {"successes": 2, "failures": 0}
    assert peers_of("1s", PeersConfig(control="random_peer")).control == "none"


@pytest.mark.parametrize(
    "settings",
    [
        {"failure_form": "contrast"},
        {"control": "success_only"},
        {"when_no_success": "failure_only"},
        {"when_no_success": "failure_only", "summaries": 2},
    ],
)
@pytest.mark.parametrize("name", ["1s", "1s+1f", "2s+1f:described"])
def test_what_is_recommended_goes_with_the_config(settings: dict[str, object], name: str) -> None:
    peers = PeersConfig.model_validate({"failures": 1} | settings)
    changed = PeersConfig.model_validate(peers.model_dump() | settings_of(name, peers))
    assert name_of(changed) == name and changed == peers_of(name, peers)


def test_a_case_has_the_targets_that_have_every_context_and_training_builds_its_prompts(
    chat: Chat, settings: Config
) -> None:
    mixed = make_group(
        chat, [("a", 1.0), ("b", 1.0), ("c", 0.0), ("d", 0.0)]
    )  # no failure stays beside a failed target
    thin = make_group(chat, [("a", 1.0), ("a", 1.0), ("c", 0.0)])  # equal texts count once
    cases, reach = survey([mixed, thin], chat, settings, ("1s", "2s+1f"), "seed")
    assert [(case.group, case.targets) for case in cases] == [(mixed, (2, 3))]
    trained = build_contexts([mixed, thin], chat, settings.peers, "seed")  # they show 2s+1f
    assert [context.prompt_ids for context in cases[0].contexts["2s+1f"]] == [
        trained[0][i].prompt_ids for i in cases[0].targets
    ]
    assert cases[0].contexts[PLAIN][0].prompt_ids == mixed.problem.prompt_ids
    assert (reach["2s+1f"].targets, reach["2s+1f"].shown, reach["2s+1f"].complete) == (7, 5, 2)
    assert (reach["1s"].shown, reach["1s"].complete) == (5, 5)


def test_what_could_not_be_judged_is_no_target(chat: Chat, settings: Config) -> None:
    group = make_group(chat, [("a", 1.0), ("b", 1.0), ("c", None)])
    cases, reach = survey([group], chat, settings, ("1s",), "seed")
    assert cases[0].targets == (0, 1) and reach["1s"].targets == 2


def test_what_the_context_names_beside_peers_is_shown_too(chat: Chat, settings: Config) -> None:
    whole = settings.model_copy(update={"context": ("privileged", "peers")})
    group = make_group(chat, [("a", 1.0), ("b", 1.0), ("c", 0.0)])
    group = replace(group, problem=replace(group.problem, privileged="count on your fingers"))
    (case,), _ = survey([group], chat, whole, ("1s",), "seed")
    for context in case.contexts["1s"]:
        read = chat.decode(context.prompt_ids or (), skip_special_tokens=False)
        assert "count on your fingers" in read and context.complete
    assert "fingers" not in chat.decode(case.contexts[PLAIN][0].prompt_ids or (), skip_special_tokens=False)
