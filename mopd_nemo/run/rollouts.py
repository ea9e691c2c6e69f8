"""Rollout files, written and read back: samples, their verdicts, and the exact prompts of their teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from mopd_nemo.chat import Chat
from mopd_nemo.config import UserError
from mopd_nemo.files import read_rows
from mopd_nemo.peers.leaks import Leak
from mopd_nemo.peers.render import PeerContext
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.types import Outcome, Problem, Rollout, RolloutGroup, Verdict

Row = Mapping[str, Any]

SHOWN = ("peers", "sources", "teacher_prompt")
"""What `describe_peers` and `teacher_prompts` need of a row; versions before 0.3 wrote no sources."""
_NEEDED = ("step", "problem", "rollout", "response", "reward", "outcome", "success")


def rollout_records(
    step: int,
    groups: Sequence[RolloutGroup],
    contexts: Sequence[Sequence[PeerContext]] | None,
    chat: Chat,
    leaks: Sequence[Sequence[tuple[Leak, ...]]] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per rollout. `contexts` is None when there is no teacher.

    The gold answer, which for programs holds all hidden tests, and privileged text stand in the first row of each
    problem alone.
    """
    for g, group in enumerate(groups):
        prompt = chat.decode(group.problem.prompt_ids, skip_special_tokens=False)
        for r, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
            row: dict[str, Any] = {
                "step": step,
                "problem": group.problem.id,
                "rollout": r,
                "task": group.problem.task,
                **({} if r else {"answer": group.problem.answer}),
                **({} if r or not group.problem.privileged else {"privileged": group.problem.privileged}),
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
                "informative": verdict.informative,
                "details": verdict.details,
                "leaks": [asdict(leak) for leak in leaks[g][r]] if leaks is not None else [],
            }
            yield row | _teacher_view(contexts[g][r] if contexts is not None else PeerContext(None), groups, chat)


def _teacher_view(context: PeerContext, groups: Sequence[RolloutGroup], chat: Chat) -> dict[str, Any]:
    shown, contrast = context.prompt_ids is not None, context.contrast_prompt_ids
    return {
        "peers": [
            {
                "kind": peer.kind,
                "problem": groups[peer.group_index].problem.id,
                "rollout": peer.rollout_index,
                "summary": peer.summary,
            }
            for peer in context.selection.peers
        ],
        "sources": list(context.sources),
        "teacher_prompt": chat.decode(context.prompt_ids or (), skip_special_tokens=False) if shown else None,
        "teacher_prompt_tokens": len(context.prompt_ids or ()) if shown else None,
        "contrast_prompt": chat.decode(contrast, skip_special_tokens=False) if contrast is not None else None,
    }


@dataclass(frozen=True, slots=True)
class RecordedGroup:
    """All recorded rollouts of one problem in one step."""

    key: str
    """`STEP/PROBLEM`, unique within its file."""
    problem_id: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The rollouts of one training step of a run, or of the evaluation after it."""

    file: Path
    step: int
    evaluation: bool
    groups: tuple[RecordedGroup, ...]

    @classmethod
    def find(cls, run: RunDirectory, step: int | None, evaluation: bool = False) -> RecordedRun:
        """Those of a step, or of the last recorded one.

        Raises:
            UserError: they are not recorded.
        """
        files = run.rollout_files("eval" if evaluation else "step")
        if not files:
            remedy = "train.eval_every" if evaluation else "logging.save_rollouts_every"
            raise UserError(f"{run.rollouts}: no rollouts recorded; set {remedy}=1")
        if step is not None and step not in files:
            raise UserError(f"--step {step}: not recorded in {run.rollouts}; recorded: {min(files)} to {max(files)}")
        chosen = max(files) if step is None else step
        return cls(files[chosen], chosen, evaluation, tuple(read_groups(files[chosen])))

    @property
    def policy_step(self) -> int:
        """The step after which the student had the weights that learned from them, or that were evaluated."""
        return self.step if self.evaluation else self.step - 1

    @property
    def described(self) -> str:
        """In words."""
        return f"held-out samples after step {self.step}" if self.evaluation else f"step {self.step}"

    def group(self, problem: str) -> RecordedGroup:
        """One problem's.

        Raises:
            UserError: it is not there.
        """
        for group in self.groups:
            if group.problem_id == problem:
                return group
        known = ", ".join(group.problem_id for group in self.groups)
        raise UserError(f"--problem {problem}: not in {self.file}; problems there: {known}")


def find_rollouts(path: Path) -> Path:
    """The file itself; of a run directory, the samples of the newest evaluation, or else of the newest training step.

    One file is one policy: steps are never pooled.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return path
    run = RunDirectory(path)
    for files in (run.rollout_files("eval"), run.rollout_files("step")):
        if files:
            return files[max(files)]
    raise UserError(f"{path}: neither a rollouts file (JSONL) nor a run directory with files in rollouts/")


def read_groups(file: Path, also: Sequence[str] = ()) -> list[RecordedGroup]:
    """The groups of a rollouts file, in order.

    Args:
        also: what rows must have beside what every reader needs.

    Raises:
        DamagedError: a line is not a row.
        UserError: a row is not a recorded rollout, or the rows of a group are not in one block.
    """
    rows = read_rows(file)
    if not rows:
        raise UserError(f"{file}: no rollouts in it; give another file, or move this one out of its run")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in (*_NEEDED, *also) if name not in row]
        if missing:
            raise UserError(
                f"{file}: row {number} lacks {', '.join(missing)}; give a rollouts file that this version of `mopd` "
                "wrote, or move this one out of its run"
            )
    groups = [
        RecordedGroup(f"{step}/{problem}", problem, tuple(members))
        for (step, problem), members in groupby(rows, key=lambda row: (row["step"], row["problem"]))
    ]
    if len({group.key for group in groups}) < len(groups):
        keys = [group.key for group in groups]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{file}: the rollouts of {twice} are not in one block; was the file put together from others?")
    return groups


def one_of_each_problem(groups: Sequence[RecordedGroup]) -> list[RecordedGroup]:
    """The first group of each problem, in order."""
    first: dict[str, RecordedGroup] = {}
    for group in groups:
        first.setdefault(group.problem_id, group)
    return list(first.values())


def group_at(run: RunDirectory, step: int, problem: str, kind: Literal["step", "eval"] = "step") -> RecordedGroup:
    """One recorded group."""
    return next(group for group in read_groups(run.rollouts_file(step, kind)) if group.problem_id == problem)


def to_rollout_group(group: RecordedGroup, chat: Chat, source: Path) -> RolloutGroup:
    """A recorded group as the pipeline had it: the same messages, sampled ids and verdicts.

    Raises:
        UserError: fields are missing, or the tokenizer or chat template is not the one of the recorded run.
    """
    head = group.rows[0]
    for name in ("messages", "response_ids"):
        if any(name not in row for row in group.rows):
            raise UserError(f"{source}: the rows of {group.key} lack {name!r}; record the rollouts again")
    messages = tuple(head["messages"])
    ids, privileged = chat.prompt_ids(messages), head.get("privileged", "")
    problem = Problem(head["problem"], messages, head["answer"], head["task"], ids, privileged=privileged)
    if chat.decode(problem.prompt_ids, skip_special_tokens=False) != head["prompt"]:
        raise UserError(
            f"{source}: this model's chat template renders the prompt of {group.key} differently than when the "
            "rollouts were sampled; set model.chat_template_kwargs as in the run, or give a model of the same family"
        )
    rollouts = tuple(_rollout(row, chat, group.key, source) for row in group.rows)
    verdicts = tuple(
        Verdict(
            row["reward"],
            Outcome(row["outcome"]),
            row.get("feedback", ""),
            dict(row.get("details", {})),
            row.get("informative", True),
            success=row["success"],
        )
        for row in group.rows
    )
    return RolloutGroup(problem, rollouts, verdicts)


def _rollout(row: Row, chat: Chat, key: str, source: Path) -> Rollout:
    ids = tuple(row["response_ids"])
    if not ids or chat.decode(ids) != row["response"]:
        raise UserError(
            f"{source}: the sampled ids of {key}, rollout {row['rollout']}, do not decode to its text with this "
            "model's tokenizer; give a model with the tokenizer that the rollouts were sampled with"
        )
    return Rollout(ids, row["response"], row["finished"], logprobs=())


def num_successes(rows: Sequence[Row]) -> int:
    """Successes among recorded rollouts. A rollout that could not be judged is no success."""
    return sum(row["success"] is True for row in rows)


def solved_fraction(rows: Sequence[Row]) -> float:
    """Share of successes among the rollouts of a group."""
    return num_successes(rows) / len(rows)


def mixed_first(rows: Iterable[Row]) -> list[list[Row]]:
    """The groups of one step's rows, most evenly mixed first: they show the most."""
    groups = [list(members) for _, members in groupby(rows, key=lambda row: row["problem"])]
    return sorted(groups, key=lambda group: abs(solved_fraction(group) - 0.5))


def teacher_prompts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Distinct teacher prompts of a group: `prompt`, the rollouts scored with it (`targets`), and the peers `shown`."""
    targets: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("teacher_prompt") is not None:
            targets.setdefault(row["teacher_prompt"], []).append(row)
    return [
        {"prompt": prompt, "targets": [row["rollout"] for row in members], "shown": describe_peers(members[0])}
        for prompt, members in targets.items()
    ]


def describe_peers(row: Mapping[str, Any]) -> str:
    """The peers that the teacher of a recorded rollout read, in words."""
    names = []
    for peer in row["peers"]:
        name = f"summary of {peer['rollout']}" if peer["summary"] else f"{peer['kind']} {peer['rollout']}"
        names.append(name if peer["problem"] == row["problem"] else f"{name} of {peer['problem']}")
    names += [source for source in row["sources"] if source != "peers"]
    return ", ".join(names) or "the plain prompt"
