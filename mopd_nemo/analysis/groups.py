"""Sample groups of a run for a page: which ones, with what the teacher said of their tokens where that is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

from mopd_nemo.analysis.tokens import Column, TokenView, page_values
from mopd_nemo.engines.base import TokenSignal
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.rollouts import SHOWN, describe_peers, mixed_first, num_successes, read_groups, teacher_prompts
from mopd_nemo.run.token_signal import RecordedSignal, read_token_signal
from mopd_nemo.terminal import shortened

GROUPS = 6
"""On a page, those with the most to see of each of its steps."""
TOKENS, TOKENS_OF_RESPONSE = 24_000, 2_000
"""With their signal, on a page and of one response: about 100 bytes each."""
CHARACTERS = 40_000
"""Of a response or a prompt, else without its middle."""

Row = Mapping[str, Any]


def sample_groups(run: RunDirectory) -> dict[str, Any] | None:
    """What the templates need to show groups of the first and the last step whose tokens are recorded.

    Without such a step, groups of the last recorded one without signals. None: no rollouts are recorded.
    """
    recorded, signals = run.rollout_files(), run.signal_files()
    if not recorded:
        return None
    told = [step for step in signals if step in recorded]
    steps = sorted({told[0], told[-1]}) if told else [max(recorded)]
    shown = _Shown()
    blocks = []
    for step in reversed(steps):  # the last one has the first claim on the page's tokens
        signal_of = _by_rollout(read_token_signal(signals[step])) if told else {}
        read = [row for group in read_groups(recorded[step], SHOWN) for row in group.rows]
        chosen = [rows for rows in mixed_first(read) if not told or _is_told(rows, signal_of)]
        blocks.append({"step": step, "groups": [shown.add(rows, signal_of) for rows in chosen[: GROUPS // len(steps)]]})
    return {
        "steps": blocks[::-1],
        "tokens": shown.page() if told else None,
        "told": {"steps": told, "shown": shown.count, "left_out": shown.left_out, "most": TOKENS},
    }


class _Shown:
    """The groups of a page, and the tokens that they have taken."""

    def __init__(self) -> None:
        self.count = self.left_out = 0
        """Tokens with and without their signal."""
        self._views: list[TokenView] = []
        self._groups: list[tuple[dict[str, Any], list[int]]] = []
        self._names: dict[int, str] = {}

    def add(self, rows: Sequence[Row], signal_of: Mapping[tuple[str, int], RecordedSignal]) -> dict[str, Any]:
        views = []
        for row in rows:
            recorded = signal_of.get((row["problem"], row["rollout"]))
            if recorded is None:
                continue
            length = min(len(recorded.texts), TOKENS_OF_RESPONSE, TOKENS - self.count)
            self.count, self.left_out = self.count + length, self.left_out + len(recorded.texts) - length
            if length:
                note = "" if length == len(recorded.texts) else f"first {length:,} of {len(recorded.texts):,} tokens"
                column = Column(describe_peers(row), beginning(recorded.signal, length), note)
                views.append(TokenView(row, recorded.texts[:length], (column,)))
                self._names |= recorded.names
        highest = max((view.highest for view in views), default=0.0)
        self._views += [replace(view, beside=highest) for view in views]
        group = {
            "rows": [{**row, "response": shortened(row["response"], CHARACTERS)} for row in rows],
            "num_correct": num_successes(rows),
            "contexts": [c | {"prompt": shortened(c["prompt"], CHARACTERS)} for c in teacher_prompts(rows)],
            "views": {},
        }
        self._groups.append((group, [view.row["rollout"] for view in views]))
        return group

    def page(self) -> dict[str, Any]:
        """What the templates need of all tokens; each group gets the views of its own, by rollout."""
        preferred = {token for view in self._views for column in view.columns for token in _preferred(column.signal)}
        values = page_values(self._views, {token: self._names[token] for token in sorted(preferred)})
        views = iter(values["views"])
        for group, rollouts in self._groups:
            group["views"] = {rollout: next(views) for rollout in rollouts}
        return values


def beginning(signal: TokenSignal, count: int) -> TokenSignal:
    """The signal of the first tokens."""
    return TokenSignal(*(values[:count] for values in astuple(signal)))


def _preferred(signal: TokenSignal) -> set[int]:
    return {*signal.teacher_top_ids.ravel().tolist(), *signal.student_top_ids.ravel().tolist()}


def _by_rollout(recorded: Sequence[RecordedSignal]) -> dict[tuple[str, int], RecordedSignal]:
    return {(own.problem, own.rollout): own for own in recorded}


def _is_told(rows: Sequence[Row], signal_of: Mapping[tuple[str, int], RecordedSignal]) -> bool:
    return any((row["problem"], row["rollout"]) in signal_of for row in rows)
