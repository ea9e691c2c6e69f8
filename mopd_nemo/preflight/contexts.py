"""Contexts by name, and the problems that have them all.

`2s+1f` is two successes and a failure, `2s+1f:contrast` the same with `peers.failure_form: contrast`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, PeersConfig, UserError
from mopd_nemo.peers.render import PeerContext, build_contexts, plain_contexts
from mopd_nemo.types import RolloutGroup

PLAIN = "none"
"""The student's own prompt, which every context is compared with."""
CONTEXTS = ("1s", "2s", "1f", "1s+1f", "2s+1f", "all")

_NAME = re.compile(r"(?:(all|[1-9]\d*)s)?(?:(?:^|\+)(all|[1-9]\d*)f)?")
FORMS = get_args(PeersConfig.model_fields["failure_form"].annotation)
CHOICES = (
    *(name for name in PeersConfig.model_fields if name.startswith("choose")),
    *("successes", "failures", "failure_form", "control"),
)
"""Settings under `peers` that no measurement depends on, because every context has its own."""
WHOLE_FORMS = ("text", "described")
"""Forms of a failure that show its whole text."""
Count = int | str


@dataclass(frozen=True, slots=True)
class Case:
    """A problem of which at least one target has all the peers of every context."""

    group: RolloutGroup
    targets: tuple[int, ...]
    """Those rollouts."""
    contexts: Mapping[str, tuple[PeerContext, ...]]
    """By name, what the teacher of each target reads; `PLAIN` included."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a context gets in some groups, whether or not a problem has all of them."""

    targets: int = 0
    shown: int = 0
    """Targets whose teacher reads something, so that they are learned from."""
    complete: int = 0
    """Targets whose teacher reads all the peers that the context asks for."""
    tokens: int = 0
    """Of the teacher prompts and the responses behind them, each counted alone."""

    def __add__(self, other: Reach) -> Reach:
        return Reach(*(getattr(self, name) + getattr(other, name) for name in Reach.__dataclass_fields__))


def parse_contexts(text: str) -> tuple[str, ...]:
    """The names in a list with commas, in order, each once.

    Raises:
        UserError: one is no context.
    """
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    for name in names:
        counts_of(name)
    if not names:
        raise UserError(f"contexts {text!r}: name at least one, for example 1s,2s+1f")
    return names


def counts_of(name: str) -> tuple[Count, Count]:
    """Success and failure peers of a context.

    Raises:
        UserError: it is none.
    """
    counts, colon, form = name.partition(":")
    match = _NAME.fullmatch(counts) if counts else None
    if (match is None and counts != "all") or (colon and form not in FORMS):
        raise UserError(
            f"context {name!r}: write successes and failures as in 1s, 2s, 1f and 2s+1f, or all; a form of failures "
            f"may follow, as in 1s+1f:described ({', '.join(FORMS)})"
        )
    if match is None:
        return "all", "all"
    successes, failures = (count if count == "all" else int(count or 0) for count in match.groups())
    if colon and not failures:
        raise UserError(f"context {name!r} shows no failures: leave out {colon}{form}")
    return successes, failures


def peers_needed(name: str) -> tuple[int, int]:
    """The fewest successes and failures beside the target with which a context is complete."""
    successes, failures = (1 if count == "all" else int(count) for count in counts_of(name))
    return successes, failures


def check_group_size(names: Sequence[str], num_rollouts: int, key: str) -> None:
    """Refuse contexts that need more peers than a group has rollouts beside the target.

    Args:
        key: where the names come from.

    Raises:
        UserError: names the context.
    """
    for name in names:
        needed = sum(peers_needed(name))
        if needed >= num_rollouts:
            raise UserError(
                f"context {name} needs {needed} peers beside the target, and groups have "
                f"rollout.num_rollouts_per_prompt={num_rollouts} rollouts: raise it, or leave {name} out of {key}"
            )


def form_of(name: str) -> str:
    """The `peers.failure_form` of a context."""
    return name.partition(":")[2] or "text"


def name_of(peers: PeersConfig) -> str:
    """The context that settings ask for."""
    successes, failures = peers.successes, peers.failures
    form = f":{peers.failure_form}" if failures and peers.failure_form != "text" else ""
    if successes == failures == "all":
        return f"all{form}"
    return "+".join(f"{count}{letter}" for count, letter in ((successes, "s"), (failures, "f")) if count) + form


def label_of(name: str) -> str:
    """A context in words."""
    if name == PLAIN:
        return "no peers"
    form = "" if form_of(name) == "text" else f" ({form_of(name)})"
    if counts_of(name) == ("all", "all"):
        return f"all peers{form}"
    nouns = (("success", "successes"), ("failure", "failures"))
    counted = [(count, *noun) for count, noun in zip(counts_of(name), nouns, strict=True) if count]
    return " + ".join(f"{count} {one if count == 1 else many}" for count, one, many in counted) + form


def settings_of(name: str, peers: PeersConfig) -> dict[str, Count]:
    """What to change under `peers` so that they ask for a context, and for nothing that does not go with it."""
    successes, failures = counts_of(name)
    wanted: dict[str, Count] = {"failure_form": form_of(name), "control": "none"}
    if not failures and not peers.summaries:
        wanted["when_no_success"] = "skip" if peers.when_no_success == "failure_only" else peers.when_no_success
    changed = {key: value for key, value in wanted.items() if getattr(peers, key) != value}
    return {"successes": successes, "failures": failures, **changed}


def peers_of(name: str, peers: PeersConfig) -> PeersConfig:
    """Settings that show one context and are otherwise as given, without a control."""
    return peers.model_copy(update=settings_of(name, peers))


def survey(
    groups: Sequence[RolloutGroup], chat: Chat, config: Config, names: Sequence[str], seed: str
) -> tuple[list[Case], dict[str, Reach]]:
    """The problems that have every context, and how far each context gets in all groups.

    Teacher prompts are those of training, with whatever else than peers `context` names: `build_contexts` makes them.
    """
    built = {
        name: build_contexts(groups, chat, peers_of(name, config.peers), seed, config.context, config.feedback)
        for name in names
    }
    built[PLAIN] = plain_contexts(groups)
    cases, reach = [], dict.fromkeys(names, Reach())
    for g, group in enumerate(groups):
        own = {name: members[g] for name, members in built.items()}
        whole = {name: [context.complete for context in own[name]] for name in names}
        for name in names:
            reach[name] += _reach(group, own[name], whole[name])
        targets = tuple(i for i in group.judged if all(whole[name][i] for name in names))
        if targets:
            contexts = {name: tuple(members[i] for i in targets) for name, members in own.items()}
            cases.append(Case(group, targets, contexts))
    return cases, reach


def _reach(group: RolloutGroup, contexts: Sequence[PeerContext], complete: Sequence[bool]) -> Reach:
    shown = [i for i in group.judged if contexts[i].prompt_ids is not None]
    tokens = sum(len(contexts[i].prompt_ids or ()) + len(group.rollouts[i].response_ids) for i in shown)
    return Reach(len(group.judged), len(shown), sum(complete[i] for i in group.judged), tokens)
