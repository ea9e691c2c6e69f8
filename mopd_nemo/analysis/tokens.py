"""What the teacher says token by token, context by context: scored with an engine, and shown as one HTML page."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from mopd_nemo.analysis.page import write_page
from mopd_nemo.chat import Chat
from mopd_nemo.config import Config
from mopd_nemo.engines.base import Engine, TokenSignal
from mopd_nemo.methods.opd import distil
from mopd_nemo.peers.render import PeerContext
from mopd_nemo.terminal import visible
from mopd_nemo.types import RolloutGroup

LEVELS = (0.1, 0.5, 1.5, 4.0)
"""Nats of |log Q - log P| from which on a token has the next stronger colour."""

Contexts = Mapping[str, Sequence[Sequence[PeerContext]]]
"""By name, then per group and rollout, what the teacher reads."""
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """One teacher's view of one response."""

    label: str
    """What it reads, in words."""
    signal: TokenSignal
    note: str = ""


@dataclass(frozen=True, slots=True)
class TokenView:
    """One response with the views of one or several teachers."""

    row: Row
    """As recorded."""
    texts: tuple[str, ...]
    """Of its tokens."""
    columns: tuple[Column, ...]
    beside: float = 0.0
    """The largest divergence of what is shown beside it, so that all strips have one top."""

    @property
    def highest(self) -> float:
        """The largest divergence, the top of the strips of all columns."""
        return max([self.beside, *(float(np.nanmax(column.signal.divergence)) for column in self.columns)])


def score_contexts(
    groups: Sequence[RolloutGroup], contexts: Contexts, engine: Engine, config: Config, top: int
) -> dict[str, list[list[TokenSignal | None]]]:
    """By context, then per group and rollout, what student and teacher say of each token; None without a context.

    All in one batch, so that the engine computes what sequences share once.
    """
    count = len(groups)
    divergence = config.divergence.model_copy(update={"targets": "all"})  # what is shown need not be learned from
    config = config.model_copy(update={"divergence": divergence})
    batch = distil([*groups] * len(contexts), [list(own) for members in contexts.values() for own in members], config)
    targets, _ = engine.score(batch)
    found: list[list[TokenSignal | None]] = [[None] * len(group.rollouts) for _ in contexts for group in groups]
    for example, signal in zip(batch.examples, engine.token_signal(batch, targets, top), strict=True):
        found[example.group_index][example.rollout_index] = signal
    return {name: found[number * count : (number + 1) * count] for number, name in enumerate(contexts)}


def level(advantage: float) -> int:
    """How far log Q - log P is from 0, as a step of the colour scale: -4 to 4, negative where the teacher objects."""
    if math.isnan(advantage):
        return 0
    steps = bisect_right(LEVELS, abs(advantage))
    return steps if advantage > 0 else -steps


def names_of(views: Iterable[TokenView], chat: Chat) -> dict[int, str]:
    """The texts of all tokens that students or teachers would rather have written."""
    ids: set[int] = set()
    for view in views:
        for column in view.columns:
            for top_ids in (column.signal.student_top_ids, column.signal.teacher_top_ids):
                ids.update(np.unique(top_ids).tolist())
    return {token: chat.decode([token], skip_special_tokens=False) for token in sorted(ids)}


def objections(signal: TokenSignal, count: int) -> list[int]:
    """The tokens that the teacher finds clearly less likely than the student, by the largest difference, in that order.

    Clearly: with a colour on the page, not by a rounding error.
    """
    order = np.argsort(signal.advantage, kind="stable")[:count]
    return [int(i) for i in order if level(signal.advantage[i]) < 0]


def legend() -> list[tuple[int, str]]:
    """The steps of the colour scale with their range in nats."""
    bounds = [f"{value:g}" for value in LEVELS]
    ranges = [f"{low} to {high}" for low, high in pairwise(bounds)] + [f"over {bounds[-1]}"]
    right = list(enumerate(ranges, start=1))
    return [*((-step, text) for step, text in reversed(right)), (0, f"within {bounds[0]}"), *right]


def page_values(views: Sequence[TokenView], names: Mapping[int, str]) -> dict[str, Any]:
    """What the templates need to show responses token by token."""
    shown, data = [], []
    for view in views:
        columns = []
        for column in view.columns:
            columns.append(
                {
                    "number": len(data),
                    "label": column.label,
                    "note": column.note,
                    "text": _coloured(view.texts, column.signal),
                    "strip": _strip(column.signal.divergence, view.highest),
                }
            )
            data.append({"label": column.label, "group": len(shown), **_numbers(column.signal)})
        shown.append({"row": view.row, "columns": columns, "highest": view.highest, "tokens": len(view.texts)})
    texts = [[one_line(text) for text in view.texts] for view in views]
    known = {str(token): one_line(text) for token, text in names.items()}
    return {"views": shown, "legend": legend(), "data": {"columns": data, "texts": texts, "names": known}}


def write_token_page(
    path: Path, views: Sequence[TokenView], names: Mapping[int, str], about: Mapping[str, str], prompt: str
) -> Path:
    """One self-contained page.

    Args:
        about: what was scored, and with which weights; shown below the title.
        prompt: of the student.
    """
    return write_page(
        path,
        "tokens.html.j2",
        about={name: visible(value) for name, value in about.items()},
        prompt=visible(prompt),
        tokens=page_values(views, names),
    )


def _coloured(texts: Sequence[str], signal: TokenSignal) -> Markup:
    """The response as one element a token. Its text is escaped."""
    parts = []
    for text, advantage in zip(texts, signal.advantage.tolist(), strict=True):
        step = level(advantage)
        name = f"{'n' if step < 0 else 'p'}{abs(step)}" if step else "z"
        shown = visible(text).replace("\n", "↵\n") or "▯"
        parts.append(Markup('<i class="{}">{}</i>').format(name, shown))
    return Markup("").join(parts)


def _strip(divergence: np.ndarray, highest: float) -> dict[str, Any]:
    """An SVG path of one bar a token, 1 wide and up to 20 high."""
    heights = 20.0 * np.nan_to_num(divergence) / (highest or 1.0)
    bars = (f"M{i} 20v-{height:.2f}h1V20z" for i, height in enumerate(heights.tolist()) if height >= 0.05)
    return {"width": len(divergence), "path": "".join(bars)}


def _numbers(signal: TokenSignal) -> dict[str, Any]:
    """The signal as JSON has it; null for what is not finite."""

    def top(ids: np.ndarray, logprobs: np.ndarray) -> list[list[list[float | None]]]:
        rows = zip(ids.tolist(), np.exp(logprobs).tolist(), strict=True)
        return [[[i, _finite(p)] for i, p in zip(own, shares, strict=True)] for own, shares in rows]

    return {
        "p": [_finite(value) for value in signal.student.tolist()],
        "q": [_finite(value) for value in signal.teacher.tolist()],
        "d": [float(f"{value:.3g}") if math.isfinite(value) else None for value in signal.divergence.tolist()],
        "student": top(signal.student_top_ids, signal.student_top),
        "teacher": top(signal.teacher_top_ids, signal.teacher_top),
    }


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def one_line(text: str) -> str:
    """A token by itself, with its line ends and spaces to be seen."""
    return visible(text).replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "▯"
