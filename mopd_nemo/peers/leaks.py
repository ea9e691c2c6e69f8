"""Leaks: responses that speak of what only a teacher reads, in the words of its prompt.

A response leaks if it repeats

- consecutive words of our templates: five of one phrase, or a whole phrase of three or four words;
- consecutive words of the problem's privileged text where the context shows it, `leak.words` of them.

Words that the question says in that order do not count, nor do case, punctuation and space. What peers wrote is not
looked for: a student may rightly write it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from mopd_nemo.chat import Chat
from mopd_nemo.config import LeakConfig, Templates
from mopd_nemo.types import RolloutGroup

Kind = Literal["template", "privileged"]
_WORD = re.compile(r"\w+")
_PHRASE, _SHORTEST = 5, 3
"""Words of a phrase that are enough, and the fewest of a whole one."""
_Grams = dict[int, dict[tuple[str, ...], Kind]]
"""By length, sequences of words that give a response away."""


@dataclass(frozen=True, slots=True)
class Leak:
    """A place in a response."""

    kind: Kind
    start: int
    """Of its first character in the text."""
    end: int
    """Behind its last one."""


def find_leaks(
    groups: Sequence[RolloutGroup], context: Sequence[str], templates: Templates, config: LeakConfig
) -> list[list[tuple[Leak, ...]]]:
    """Per group and rollout, its leaks in order; overlapping ones of a kind are joined.

    Args:
        context: the sources that teachers read.
    """
    phrases = list(_phrases(templates))
    found = []
    for group in groups:
        privileged = group.problem.privileged if "privileged" in context else ""
        grams = _grams(phrases, privileged, " ".join(m["content"] for m in group.problem.messages), config.words)
        found.append([_leaks_in(rollout.text, grams) for rollout in group.rollouts])
    return found


def leak_metrics(leaks: Sequence[Sequence[tuple[Leak, ...]]]) -> dict[str, float]:
    """`leak/rate`: fraction of rollouts that leak; `leak/template`, `leak/privileged`: by what they repeat."""
    kinds = [{leak.kind for leak in own} for group in leaks for own in group]
    return {
        "leak/rate": fmean(map(bool, kinds)),
        "leak/template": fmean("template" in own for own in kinds),
        "leak/privileged": fmean("privileged" in own for own in kinds),
    }


def leaking_tokens(leaks: Iterable[Leak], ids: Sequence[int], chat: Chat) -> tuple[int, ...]:
    """Positions of the response tokens that share a character with a leak, in order.

    Args:
        leaks: in the text of the ids without special tokens.
    """
    spans = [(leak.start, leak.end) for leak in leaks]
    positions, start = [], 0
    for position, text in enumerate(chat.token_texts(ids)):
        end = start + len(text if chat.decode(ids[position : position + 1]) or not text else "")
        if any(start < last and first < end for first, last in spans):
            positions.append(position)
        start = end
    return tuple(positions)


def _phrases(templates: Templates) -> Iterator[list[str]]:
    """The words of each line of each template, apart from those that it is filled with."""
    for name in type(templates).model_fields:
        for part in re.split(r"\{text\}|\n", getattr(templates, name)):
            if len(words := _WORD.findall(part.lower())) >= _SHORTEST:
                yield words


def _grams(phrases: Sequence[Sequence[str]], privileged: str, question: str, length: int) -> _Grams:
    """What to look for, without what the question says."""
    grams: _Grams = {length: dict.fromkeys(_runs(_WORD.findall(privileged.lower()), length), "privileged")}
    for phrase in phrases:
        size = min(_PHRASE, len(phrase))
        for run in _runs(phrase, size):
            grams.setdefault(size, {})[run] = "template"
    asked = _WORD.findall(question.lower())
    for size, known in grams.items():
        for run in _runs(asked, size):
            known.pop(run, None)
    return {size: known for size, known in grams.items() if known}


def _runs(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def _leaks_in(text: str, grams: _Grams) -> tuple[Leak, ...]:
    places = [match.span() for match in _WORD.finditer(text)]
    words = [text[start:end].lower() for start, end in places]
    joined: list[Leak] = []
    found = sorted(
        (places[i][0], places[i + size - 1][1], kind)
        for size, known in grams.items()
        for i, run in enumerate(_runs(words, size))
        if (kind := known.get(run)) is not None
    )
    for start, end, kind in found:
        if joined and joined[-1].kind == kind and start <= joined[-1].end:
            joined[-1] = Leak(kind, joined[-1].start, max(end, joined[-1].end))
        else:
            joined.append(Leak(kind, start, end))
    return tuple(joined)
