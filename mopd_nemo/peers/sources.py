"""What a context may show beside peers: feedback, privileged text of the problem, and what functions of users return.

A source gives sections, which are pieces of evidence under headings, for one target. It is pure: the same group and
target give the same sections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mopd_nemo.chat import Chat
from mopd_nemo.config import FeedbackConfig, UserError
from mopd_nemo.config.plugins import context_function
from mopd_nemo.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class ContextSection:
    """One piece of evidence in a context."""

    kind: Literal[
        "success",
        "failure",
        "failure_feedback",
        "failure_difference",
        "success_summary",
        "failure_summary",
        "feedback",
        "privileged",
        "own",
    ]
    """Names the template of its heading. `own`: it brings its heading."""
    text: str
    heading: str = ""


def sections_from(
    source: str, group: RolloutGroup, target: int, *, reads_success: bool, feedback: FeedbackConfig, chat: Chat
) -> tuple[ContextSection, ...]:
    """What a source other than peers shows the teacher of one target. Empty texts are left out.

    Args:
        target: index of the rollout within its group.
        reads_success: whether this teacher reads a successful peer.

    Raises:
        UserError: a function of the user's failed, or returned something else than pairs of heading and text.
    """
    match source:
        case "feedback":
            verdict = group.verdicts[target]
            wanted = feedback.when == "always" or not reads_success
            said = verdict.feedback if wanted and (verdict.informative or feedback.which == "all") else ""
            sections = [ContextSection("feedback", said)]
        case "privileged":
            sections = [ContextSection("privileged", group.problem.privileged)]
        case _:
            pairs = _call(source, group, target)
            sections = [ContextSection("own", text, chat.escape_control_tokens(heading)) for heading, text in pairs]
    cleaned = (replace(section, text=chat.escape_control_tokens(section.text).strip()) for section in sections)
    return tuple(section for section in cleaned if section.text)


def _call(name: str, group: RolloutGroup, target: int) -> Sequence[tuple[str, str]]:
    """The (heading, text) pairs that a function of the user's returns."""
    function = context_function(name)
    where = f"context={name}, problem {group.problem.id!r}, rollout {target}"
    try:
        returned: Any = function(group, target)
    except (Exception, SystemExit) as error:  # it is the user's code: it may raise anything
        raise UserError(f"{where}: the function failed with {type(error).__name__}: {error}") from error
    pairs = returned if isinstance(returned, list | tuple) else None
    if pairs is None or not all(
        isinstance(pair, list | tuple) and list(map(type, pair)) == [str, str] for pair in pairs
    ):
        raise UserError(
            f"{where}: the function returned {returned!r:.100}: return a list of (heading, text) pairs of str, "
            "empty where there is nothing to show"
        )
    for said in (said for pair in pairs for said in pair):
        if not said.isascii() and any("\ud800" <= character <= "\udfff" for character in said):
            raise UserError(f"{where}: the function returned {said!r:.100}, which holds half of a character: repair it")
    return pairs
