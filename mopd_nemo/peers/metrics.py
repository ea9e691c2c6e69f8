"""Metrics of groups and contexts, logged every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import get_args

from mopd_nemo.chat import after_thinking
from mopd_nemo.config import PeersConfig
from mopd_nemo.peers.render import PeerContext
from mopd_nemo.peers.select import Candidates, Kind, select_peers
from mopd_nemo.types import Outcome, RolloutGroup


def group_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Success rate, outcomes and make-up of the groups of a step.

    `success_rate`: successes among judged rollouts (verifier errors are not counted).
    `outcome/*`: fraction of all rollouts; `outcome/undecided` are those wrong ones that could not be compared with the
    gold answer in time.
    `success_without_text`: fraction of the successes that say nothing outside their thinking; they teach nobody.
    `group/all_failed`, `group/lone_success`, `group/all_succeeded`: fraction of groups.
    """
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    successes = [len(group.successes) for group in groups]
    failures = [len(group.failures) for group in groups]
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    judged = sum(successes) + sum(failures)
    return {
        "success_rate": sum(successes) / max(judged, 1),
        "reward": fmean(verdict.reward for verdict in verdicts),
        **{f"outcome/{outcome}": outcomes[outcome] / len(verdicts) for outcome in Outcome},
        "outcome/undecided": fmean("undecided" in verdict.details for verdict in verdicts),
        "success_without_text": sum(map(_says_nothing, groups)) / max(sum(successes), 1),
        "group/all_failed": fmean(s == 0 for s in successes),
        "group/lone_success": fmean(s == 1 for s in successes),
        "group/all_succeeded": fmean(f == 0 for f in failures),
        "response/tokens": fmean(len(rollout.response_ids) for rollout in rollouts),
        "response/unfinished": fmean(not rollout.finished for rollout in rollouts),
    }


def _says_nothing(group: RolloutGroup) -> int:
    return sum(not after_thinking(group.rollouts[index].text).strip() for index in group.successes)


def context_metrics(contexts: Sequence[Sequence[PeerContext]]) -> dict[str, float]:
    """Make-up of the teacher contexts of a step.

    `signal`: fraction of rollouts that a teacher scores. The other means are over those rollouts, except two fractions
    of all rollouts: `context/complete` (the teacher reads as many peers as were asked for), `context/overflow` (they
    did not fit). `context/SOURCE`: those that show something of a source other than peers.
    """
    every = [context for group in contexts for context in group]
    shown = [context for context in every if context.prompt_ids is not None]
    metrics = {
        "signal": len(shown) / max(len(every), 1),
        "context/complete": sum(context.complete for context in shown) / max(len(every), 1),
        "context/overflow": fmean(context.overflow for context in every) if every else 0.0,
    }
    if shown:
        distinct = [len({c.prompt_ids for c in group if c.prompt_ids is not None}) for group in contexts]
        others = {source for context in shown for source in context.sources} - {"peers"}
        metrics |= {f"context/{source}": fmean(source in context.sources for context in shown) for source in others}
        metrics |= {
            "context/tokens": fmean(len(context.prompt_ids or ()) for context in shown),
            "context/successes": fmean(_count(context, "success") for context in shown),
            "context/failures": fmean(_count(context, "failure") for context in shown),
            "context/summaries": fmean(len(context.selection.summaries) for context in shown),
            "context/other_problems": fmean(
                sum(peer.group_index != group_index for peer in context.selection.peers)
                for group_index, group in enumerate(contexts)
                for context in group
                if context.prompt_ids is not None
            ),
            "context/cut": fmean(context.num_truncated > 0 for context in shown),
            "context/distinct_per_group": fmean(n for n in distinct if n),
        }
    return metrics


def dedupe_metrics(candidates: Sequence[Candidates], config: PeersConfig) -> dict[str, float]:
    """Which targets `peers.dedupe` is about, whatever it is: fractions of all rollouts.

    `dedupe/all`, `dedupe/peers`, `dedupe/none`: targets that would read other texts with this value than with the
    configured one, which is left out. In random order, where every value draws anew, the peers are compared that
    canonical order would choose.
    `dedupe/only_twins`: targets whose other successes all read like them: no success is left for them with `all`.
    """
    order = "canonical" if config.order == "random" else config.order
    shown = {
        dedupe: [_texts_shown(own, config.model_copy(update={"dedupe": dedupe, "order": order})) for own in candidates]
        for dedupe in get_args(PeersConfig.model_fields["dedupe"].annotation)
    }
    own = [texts for group in shown[config.dedupe] for texts in group]
    metrics = {
        f"dedupe/{dedupe}": _share(a != b for a, b in zip([t for group in groups for t in group], own, strict=True))
        for dedupe, groups in shown.items()
        if dedupe != config.dedupe
    }
    only_twins = [_has_only_twins(group, i) for group in candidates for i in range(len(group.texts))]
    return metrics | {"dedupe/only_twins": _share(only_twins)}


def _texts_shown(own: Candidates, config: PeersConfig) -> list[list[tuple[str, str]] | None]:
    """Per rollout, kind and text of the peers that it would be shown; None when it would not be taught."""
    return [
        None if selection is None else sorted((peer.kind, own.texts[peer.rollout_index]) for peer in selection.peers)
        for selection in select_peers(own, config, "")
    ]


def _has_only_twins(own: Candidates, target: int) -> bool:
    others = [i for i in own.successes if i != target and own.texts[i]]
    return bool(others) and len(own.twins(target, "success")) == len(others)


def _share(flags: Iterable[bool]) -> float:
    found = list(flags)
    return sum(found) / max(len(found), 1)


def _count(context: PeerContext, kind: Kind) -> int:
    """Peers shown in full under a heading."""
    return sum(peer.kind == kind for peer in context.selection.full_peers)
