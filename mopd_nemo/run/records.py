"""Rollouts as JSON rows: what was sampled, how it was judged, and exactly what its teacher read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mopd_nemo.chat import Chat
from mopd_nemo.peers.contexts import PeerContext
from mopd_nemo.peers.select import Selection
from mopd_nemo.types import RolloutGroup


def rollout_records(
    step: int, groups: Sequence[RolloutGroup], contexts: Sequence[Sequence[PeerContext]] | None, chat: Chat
) -> Iterator[dict[str, Any]]:
    """One row per rollout. `contexts` is None when no teacher reads anything."""
    for g, group in enumerate(groups):
        prompt = chat.decode(group.problem.prompt_ids, skip_special_tokens=False)
        for r, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
            row: dict[str, Any] = {
                "step": step,
                "problem": group.problem.id,
                "rollout": r,
                "task": group.problem.task,
                "answer": group.problem.answer,
                "messages": list(group.problem.messages),
                "prompt": prompt,
                "response": rollout.text,
                "response_ids": list(rollout.response_ids),
                "response_tokens": len(rollout.response_ids),
                "finished": rollout.finished,
                "reward": verdict.reward,
                "outcome": verdict.outcome,
                "success": verdict.success,
                "feedback": verdict.feedback,
                "details": verdict.details,
            }
            yield row | _teacher_view(
                contexts[g][r] if contexts is not None else PeerContext(Selection(), None), groups, chat
            )


def describe_peers(row: Mapping[str, Any]) -> str:
    """What the teacher of a recorded rollout was shown, in words."""
    peers = row["peers"]
    shown = [f"success {i}" for i in peers["successes"]] + [f"failure {i}" for i in peers["failures"]]
    shown += [f"summary of {i}" for i in peers["summaries"]]
    shown += [f"{peer['kind']} {peer['rollout']} of {peer['problem']}" for peer in peers["others"]]
    if row["uses_feedback"]:
        shown.append("feedback")
    return ", ".join(shown) or "the plain prompt"


def _teacher_view(context: PeerContext, groups: Sequence[RolloutGroup], chat: Chat) -> dict[str, Any]:
    shown = context.prompt_ids is not None
    selection = context.selection
    return {
        "peers": {
            "successes": list(selection.successes),
            "failures": list(selection.failures),
            "summaries": list(selection.summaries),
            "others": [
                {"kind": peer.kind, "problem": groups[peer.group].problem.id, "rollout": peer.rollout}
                for peer in selection.others
            ],
        },
        "uses_feedback": selection.feedback,
        "teacher_prompt": chat.decode(context.prompt_ids or (), skip_special_tokens=False) if shown else None,
        "teacher_prompt_tokens": len(context.prompt_ids or ()) if shown else None,
    }
