"""Where failed responses leave the successful ones of their group, and how much of the teacher's signal is there.

A *point* is the first token with which a response leaves all others that it is compared with: a failure all successes
of its group, a success the successes that are not the same.

`tokens`    the first token after the longest prefix that it has in common with any of them
`parts`     the token in which the first part begins that none of them has: a statement of a program, else a sentence
            or line (`peers.contrast`)

The signal near a point is the share of a response's sum that lies within some tokens of it. Such a share is large by
itself in a short response, where all responses are uncertain, and wherever a token was unlikely for the student, which
the first one that no success has is bound to be. So each share stands beside others of the same tokens: see `COLUMNS`.

Suffix: T tokens of a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from mopd_nemo.evaluation import bootstrap_interval
from mopd_nemo.peers.contrast import different_parts

POINTS = ("tokens", "parts")
MEASURES = ("log_ratio", "divergence")
"""|log Q - log P| of the sampled token; the divergence that the token is learned under."""
SETS = ("common", "own")
"""`common`: failures that every context has a signal for; `own`: those that the context itself has one for."""
COLUMNS = {
    "near": "share of the signal within the radius",
    "shuffled": "expected share when the values of the response are shuffled over its positions: an exact mean",
    "elsewhere": "mean share in the same response, at the places where failures of other problems have their points",
    "in_successes": "mean share at the same place of the successes of the group",
    "surprise": "share of -log P of the student within the radius: no teacher",
}
"""Of a failure, all with windows of one radius. A place is a fraction of the response's length."""
AGAINST = ("shuffled", "elsewhere", "in_successes", "surprise")
"""Columns that `near` is compared with, failure by failure."""
SILENT = 1e-3
"""Nats a token: a mean |log Q - log P| up to which a teacher says nothing but rounding errors."""
DISTANCES = range(-10, 11)

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Told:
    """What a teacher says of a response: [T] each, nats."""

    log_ratio: Array
    """log Q - log P of the sampled token."""
    divergence: Array

    @property
    def silent(self) -> bool:
        """It says nothing, or nothing finite."""
        finite = np.isfinite(self.log_ratio).all() and np.isfinite(self.divergence).all()
        return not finite or float(np.abs(self.log_ratio).mean()) <= SILENT


@dataclass(frozen=True, slots=True)
class Attempt:
    """A response of a group that has successes and failures."""

    success: bool
    points: Mapping[str, int | None]
    """By `POINTS`; None: it leaves the others nowhere, or there are none."""
    surprise: Array
    """[T] -log P of the student."""
    told: Mapping[str, Told]
    """By context, where the teacher reads all that the context asks for and is not silent."""


Group = Sequence[Attempt]
"""Of one problem."""


def first_new_token(ids: Sequence[int], others: Sequence[Sequence[int]]) -> int | None:
    """The index of the first token with which a response leaves all others; None: one of them begins like all of it.

    >>> first_new_token([1, 2, 3, 4], [[1, 5], [1, 2, 6, 4]])
    2
    """
    shared = [
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, other, strict=False))) for other in others
    ]
    return max(shared) if shared and max(shared) < len(ids) else None


def first_new_part(text: str, others: Sequence[str], token_texts: Sequence[str]) -> int | None:
    """The index of the token in which the first part begins that no other response has.

    Args:
        token_texts: of the response; joined, they begin with `text`.
    """
    parts = different_parts(text, others) if others else []
    ends = np.cumsum([len(token) for token in token_texts])
    return int(np.searchsorted(ends, parts[0].start, side="right")) if parts else None


def near(values_T: Array, at: Array | int, radius: int) -> Array:
    """Share of the values' sum within a radius of one token or of several. No value is negative; NaN if all are 0.

    >>> near(np.array([1.0, 0.0, 2.0, 1.0]), np.array([0, 2]), 1).tolist()
    [0.25, 0.75]
    """
    sums = np.concatenate([[0.0], np.cumsum(values_T, dtype=float)])
    low, high = np.maximum(at - radius, 0), np.minimum(at + radius + 1, len(values_T))
    return (sums[high] - sums[low]) / sums[-1] if sums[-1] > 0 else np.full(np.shape(at), np.nan)


def branch_figures(
    groups: Sequence[Group], contexts: Sequence[str], controls: Mapping[str, str], radii: Sequence[int]
) -> dict[str, Any]:
    """All figures. A cell is a mean over problems of means over their failures: `mean`, `low`, `high`, `problems`.

    Args:
        contexts: with the controls among them.
        controls: by context, the one whose peers are those of other problems.

    Returns:
        `speaking`: contexts whose teachers are not always silent. Then, by kind of point:
        `points`: facts about them.
        `near`: by measure, radius, set and context, cells of `COLUMNS`, of `minus_NAME` for each of `AGAINST` and the
        control, and of `successes_minus_shuffled`, at the points of successes.
        `profile`: by measure and context, at each distance from the point, as a multiple of the response's mean.
        `at_point`: by context, log Q - log P of the token there.
    """
    speaking = [name for name in contexts if any(name in a.told for group in groups for a in group)]
    result: dict[str, Any] = {"speaking": speaking, "points": {}, "near": {}, "profile": {}, "at_point": {}}
    for kind in POINTS:
        failures = _Failures(groups, kind, speaking)
        result["points"][kind] = failures.facts()
        result["near"][kind] = {
            measure: {str(radius): failures.near(measure, radius, controls) for radius in radii} for measure in MEASURES
        }
        result["profile"][kind] = {
            measure: {name: failures.profile(measure, name) for name in (*speaking, "surprise")} for measure in MEASURES
        }
        result["at_point"][kind] = {name: failures.at_point(name) for name in speaking}
    return result


class _Failures:
    """The failures that have a point of one kind, problem by problem."""

    def __init__(self, groups: Sequence[Group], kind: str, contexts: Sequence[str]) -> None:
        self._groups = groups
        self._contexts = contexts
        self._pointed = [_pointed(group, kind, success=False) for group in groups]
        self._successes = [_pointed(group, kind, success=True) for group in groups]
        self._common = [
            np.array([all(name in a.told for name in contexts) for a, _ in own], bool) for own in self._pointed
        ]
        self._places = [np.array([at / max(len(a.surprise) - 1, 1) for a, at in own]) for own in self._pointed]

    def facts(self) -> dict[str, Any]:
        """How many there are, and where they have their points."""
        at = np.array([at for own in self._pointed for _, at in own])
        lengths = np.array([len(a.surprise) for own in self._pointed for a, _ in own])
        return {
            "failures": sum(not a.success for group in self._groups for a in group),
            "with_point": len(at),
            "common": int(sum(own.sum() for own in self._common)),
            "at_first_token": int((at == 0).sum()),
            "at_last_token": int((at == lengths - 1).sum()),
            "quartiles": {
                "token": _quartiles(at),
                "place": _quartiles(np.concatenate([np.zeros(0), *self._places])),
                "length": _quartiles(lengths),
            },
        }

    def near(self, measure: str, radius: int, controls: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """By set and context."""
        rows = {
            name: [self._rows(g, measure, radius, name) for g in range(len(self._groups))] for name in self._contexts
        }
        of_successes = {
            name: [
                np.array([_excess(_size(a, name, measure), at, radius) for a, at in own if name in a.told])
                for own in self._successes
            ]
            for name in self._contexts
        }
        sets = {"common": self._common, "own": [np.ones(len(own), bool) for own in self._pointed]}
        return {
            chosen: {
                name: _cells(rows[name], rows.get(controls.get(name, "")), keep)
                | {"successes_minus_shuffled": _cell(of_successes[name])}
                for name in self._contexts
            }
            for chosen, keep in sets.items()
        }

    def profile(self, measure: str, name: str) -> list[dict[str, Any]]:
        """At each distance from the point, the value as a multiple of the response's mean; `surprise`: of -log P."""
        values: dict[int, list[Array]] = {distance: [] for distance in DISTANCES}
        for own, keep in zip(self._pointed, self._common, strict=True):
            found: dict[int, list[float]] = {distance: [] for distance in DISTANCES}
            for (attempt, at), kept in zip(own, keep, strict=True):
                size_T = attempt.surprise if name == "surprise" else _size(attempt, name, measure) if kept else None
                if kept and size_T is not None and size_T.sum() > 0:
                    for distance in DISTANCES:
                        if 0 <= at + distance < len(size_T):
                            found[distance].append(size_T[at + distance] / size_T.mean())
            for distance, numbers in found.items():
                values[distance].append(np.array(numbers))
        return [{"distance": distance, **_cell(by_problem)} for distance, by_problem in values.items()]

    def at_point(self, name: str) -> dict[str, Any]:
        """log Q - log P of the token at the point, of failures and of successes, and the mean size of any token's."""
        kept = [
            [pair for pair, keep in zip(own, flags, strict=True) if keep]
            for own, flags in zip(self._pointed, self._common, strict=True)
        ]
        sides = {"failures": kept, "successes": self._successes}
        cells = {
            side: _cell([np.array([a.told[name].log_ratio[at] for a, at in own if name in a.told]) for own in pointed])
            for side, pointed in sides.items()
        }
        return cells | {
            "mean_size": _cell([np.array([_size(a, name, "log_ratio").mean() for a, _ in own]) for own in kept])
        }

    def _rows(self, g: int, measure: str, radius: int, name: str) -> Array:
        """`COLUMNS` of a problem's failures: [failures, columns]; NaN where there is no signal."""
        others = [own for number, own in enumerate(self._places) if number != g and len(own)]
        places = np.concatenate([np.zeros(0), *others])
        weights = np.concatenate([np.zeros(0), *(np.full(len(own), 1 / len(own)) for own in others)])
        successes = [_size(a, name, measure) for a in self._groups[g] if a.success and name in a.told]
        rows = np.full((len(self._pointed[g]), len(COLUMNS)), np.nan)
        for row, (attempt, at), place in zip(rows, self._pointed[g], self._places[g], strict=True):
            if name not in attempt.told:
                continue
            size_T = _size(attempt, name, measure)
            row[0] = near(size_T, at, radius)
            row[1] = near(np.ones(len(size_T)), at, radius)
            if len(places):
                row[2] = np.average(near(size_T, _tokens_at(places, len(size_T)), radius), weights=weights)
            if successes:
                row[3] = np.mean([near(own_T, _tokens_at(place, len(own_T)), radius) for own_T in successes])
            row[4] = near(attempt.surprise, at, radius)
        return rows


def _cells(rows: Sequence[Array], control: Sequence[Array] | None, keep: Sequence[Array]) -> dict[str, Any]:
    """Cells of one context from its failures' rows, problem by problem."""
    kept = [own[flags] for own, flags in zip(rows, keep, strict=True)]
    names = list(COLUMNS)
    cells: dict[str, Any] = {name: _cell([own[:, i] for own in kept]) for i, name in enumerate(names)}
    for name in AGAINST:
        cells[f"minus_{name}"] = _cell([own[:, 0] - own[:, names.index(name)] for own in kept])
    if control is not None:
        others = [other[flags] for other, flags in zip(control, keep, strict=True)]
        cells["minus_control"] = _cell([own[:, 0] - other[:, 0] for own, other in zip(kept, others, strict=True)])
    return cells | {"failures": int(sum(np.isfinite(own[:, 0]).sum() for own in kept))}


def _cell(by_problem: Sequence[Array]) -> dict[str, Any]:
    """Mean over problems of the means of their values; NaN and problems without a value are left out."""
    means = [own[np.isfinite(own)].mean() for own in by_problem if np.isfinite(own).any()]
    if not means:
        return {"mean": None, "low": None, "high": None, "problems": 0}
    low, high = bootstrap_interval(means)
    return {"mean": float(np.mean(means)), "low": low, "high": high, "problems": len(means)}


def _pointed(group: Group, kind: str, *, success: bool) -> list[tuple[Attempt, int]]:
    """Failures or successes with their points, those that have one."""
    return [(a, at) for a in group if a.success == success and (at := a.points[kind]) is not None]


def _size(attempt: Attempt, name: str, measure: str) -> Array:
    return np.abs(getattr(attempt.told[name], measure))


def _excess(size_T: Array, at: int, radius: int) -> Array:
    return near(size_T, at, radius) - near(np.ones(len(size_T)), at, radius)


def _tokens_at(places: Array, length: int) -> Array:
    return np.rint(places * (length - 1)).astype(int)


def _quartiles(values: Array) -> list[float]:
    return np.percentile(values, [25, 50, 75]).tolist() if len(values) else []
