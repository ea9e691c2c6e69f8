"""The recommendation: a stated rule over the figures, in plain words. `docs/preflight.md` states it for users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopd_nemo.evaluation import MIN_PROBLEMS, has_interval
from mopd_nemo.preflight.contexts import FORMS, PLAIN, counts_of, form_of, label_of


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Which context to show, how sure that is, and why."""

    context: str | None
    """The context to use; where none clearly helps, the one that does the least harm. None: too few problems."""
    clear: bool
    """After it, the model clearly writes better than without peers."""
    sentences: tuple[str, ...]
    """The finding, most important first."""
    cautions: tuple[str, ...] = ()


def recommend(figures: Mapping[str, Any]) -> Recommendation:
    """Judge the contexts by what the model writes after them, problem by problem.

    1. Too few problems: cannot tell.
    2. A context *helps* when the whole interval of its gap to no peers is above 0, and *harms* when it is below.
    3. The best is the context with the largest gap. Another cannot be told from it when the interval of their
       difference holds 0.
    4. Of the helping contexts that cannot be told from the best, the one with the fewest failures is recommended, then
       the one with the fewest peers.
    5. No context helps: the one with the largest gap does the least harm.
    """
    contexts, num = figures["contexts"], figures["num_problems"]
    names = [name for name in contexts if name != PLAIN]
    if num < MIN_PROBLEMS or any(contexts[name]["gap"]["mean"] is None for name in names):
        return Recommendation(None, False, (_too_few(num, contexts, names),))
    best = max(names, key=lambda name: contexts[name]["gap"]["mean"])
    level = [name for name in names if name == best or _sign(figures["minus"][best][name]) == 0]
    helping = sorted((name for name in level if _sign(contexts[name]["gap"]) > 0), key=_plainness)
    chosen = helping[0] if helping else best
    sentences = [
        _headline(chosen, figures, bool(helping)),
        *_ties(helping),
        *_failures(figures, names),
        *_configured(figures, chosen),
        *_besides(figures),
    ]
    return Recommendation(chosen, bool(helping), tuple(sentences), _cautions(chosen, contexts))


def _too_few(num: int, contexts: Mapping[str, Any], names: Sequence[str]) -> str:
    rarest = min(names, key=lambda name: contexts[name]["complete"])
    return (
        f"Cannot tell: {num} problems have every context, and {MIN_PROBLEMS} are needed. Sample more groups, or leave "
        f"out the rarest context: {rarest}, which {contexts[rarest]['complete']:.0%} of the targets have."
    )


def _headline(chosen: str, figures: Mapping[str, Any], helps: bool) -> str:
    contexts = figures["contexts"]
    gap, right, plain = (contexts[chosen]["gap"], contexts[chosen]["right"], contexts[PLAIN]["right"])
    found = f"{percent(right)} % of what it writes is right, without peers {percent(plain)} %: {points(gap, 'points')}"
    if helps:
        return f"Use {chosen} ({label_of(chosen)}): after it {found}."
    if all(_sign(contexts[name]["gap"]) < 0 for name in contexts if name != PLAIN):
        return f"Every context harms this model. The least harm does {chosen} ({label_of(chosen)}): after it {found}."
    return (
        f"Cannot tell whether any context helps this model. The least harm does {chosen} ({label_of(chosen)}): "
        f"after it {found}."
    )


def _ties(level: Sequence[str]) -> list[str]:
    """The contexts that are as good, plainest first."""
    if len(level) < 2:
        return []
    return [
        f"Cannot tell {_and(level)} apart: the intervals of their differences to the best of them hold 0. "
        f"{level[0]} shows the least."
    ]


def _failures(figures: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """What failures do: beside successes compared with the same successes alone, else alone compared with no peers."""
    beside = {name: _without_failures(name) for name in names if all(counts_of(name))}
    pairs = {name: figures["minus"][name][alone] for name, alone in beside.items() if alone in names}
    lone = {name: figures["contexts"][name]["gap"] for name in names if not counts_of(name)[0]}
    judged = pairs or lone
    if not judged:
        return []
    worse = [name for name in judged if _sign(judged[name]) < 0]
    better = [name for name in judged if _sign(judged[name]) > 0]
    what = "beside successes" if pairs else "alone"
    if worse and not better:
        shown = [name for name in (*worse, *lone) if name in worse or _sign(lone[name]) < 0]
        proof = ", ".join(f"{name} {points(judged[name])}" for name in worse)
        against = "the same successes alone" if pairs else "no peers"
        copied = _copied(figures, shown)
        does = "This model copies failures" if copied else "Failures harm this model"
        return [f"{does}: use successes only. Against {against}: {proof} points.{copied}"]
    if better and not worse:
        return [f"Failures {what} help this model ({', '.join(f'{n} {points(judged[n])}' for n in better)} points)."]
    return [f"Cannot tell whether failures {what} help or harm this model."]


def _copied(figures: Mapping[str, Any], names: Sequence[str]) -> str:
    """Where it copies word for word clearly more often than it writes the same without having read it."""
    parts = []
    for name in names:
        cells = figures["contexts"][name]
        if _sign(cells["copies_more"]) > 0:
            after, without = percent(cells["copies"]), percent(cells["copies_without"])
            parts.append(f"{after} % after {name} ({without} % without reading it)")
    return f" Of what it writes is a shown failure, word for word: {', '.join(parts)}." if parts else ""


def _configured(figures: Mapping[str, Any], chosen: str) -> list[str]:
    """Whether the settings that were given show something worse."""
    name = figures["configured"]
    if name == chosen or name not in figures["contexts"]:
        return []
    gap = figures["minus"][chosen][name]
    if _sign(gap) > 0:
        return [
            f"The config shows {name} ({label_of(name)}), which is {points(gap, 'points', sign='')} worse: change it."
        ]
    return []


def _besides(figures: Mapping[str, Any]) -> list[str]:
    """What each context shows beside its peers."""
    if not (others := figures["besides"]):
        return []
    return [
        f"Each context also shows {_and(others)}, as the config's context does; without peers the model reads the "
        "student's prompt alone."
    ]


def _cautions(chosen: str, contexts: Mapping[str, Any]) -> tuple[str, ...]:
    own, cautions = contexts[chosen], []
    if _sign(own["flatter"]) > 0:
        cautions.append(
            f"After {chosen} the model is less sure of what it writes than without peers (entropy "
            f"{own['entropy']['mean']:.2f} beside {contexts[PLAIN]['entropy']['mean']:.2f} nats a token): "
            "such a teacher flattens its student. Watch the first steps."
        )
    if _sign(own["cut"]) > 0:
        cautions.append(
            f"After {chosen} more responses are cut at the limit ({percent(own['unfinished'])} % beside "
            f"{percent(contexts[PLAIN]['unfinished'])} %): raise rollout.max_response_tokens or shorten the peers."
        )
    if own["complete"] < 0.25:
        cautions.append(
            f"Only {own['complete']:.0%} of the targets would read the whole of {chosen}; the others read less or are "
            "skipped. Larger groups help."
        )
    return tuple(cautions)


def _sign(interval: Mapping[str, float | None]) -> int:
    """1 or -1 when the whole interval is on one side of 0, else 0."""
    low, high = interval["low"], interval["high"]
    if low is None or high is None:
        return 0
    return (low > 0) - (high < 0)


def _plainness(name: str) -> tuple[float, float, int]:
    """Fewest failures first, then fewest peers, then the plainest form."""
    successes, failures = (float("inf") if count == "all" else float(count) for count in counts_of(name))
    return failures, successes + failures, FORMS.index(form_of(name))


def _without_failures(name: str) -> str:
    return f"{counts_of(name)[0]}s"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def percent(value: Mapping[str, float | None]) -> str:
    """A share as a whole number of per cent."""
    return "–" if value["mean"] is None else f"{100 * value['mean']:.0f}"


def points(value: Mapping[str, float | None], unit: str = "", sign: str = "+") -> str:
    """A share in per cent, or a difference of shares in points, with its interval in brackets."""
    if value["mean"] is None:
        return "–"
    mean, low, high = (format(100 * (value[end] or 0.0), f"{sign}.0f") for end in ("mean", "low", "high"))
    if not has_interval(value["low"] or 0.0, value["high"] or 0.0, value["num"] or 0):
        return f"{mean}{unit and ' ' + unit} (too few problems)"
    return f"{mean}{unit and ' ' + unit} ({low} to {high})"
