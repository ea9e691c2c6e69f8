"""Methods that this package adds to NeMo-RL's policy workers of either backend, and the self-teacher.

A self-teacher is an exponential moving average of the student's weights, or the weights at the start of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mopd_nemo.engines.base import seed_of
from mopd_nemo.engines.nemo.batches import Scored
from mopd_nemo.engines.nemo.workers.self_teacher import Part, SelfTeacher, Share
from mopd_nemo.engines.nemo.workers.targets import KeptTargets, as_array
from mopd_nemo.losses.logits import Head, Tokens
from mopd_nemo.losses.objectives import Divergence
from mopd_nemo.losses.token_signal import Reading, read_tokens
from mopd_nemo.losses.vocab import Vocab

Scores = dict[str, Tensor]
"""`ids` [T, k] int32 and `logprobs` [T, k], T response tokens sequence by sequence in order, and `counts` [2]:
positions that were computed for them, and how many of these held no token."""

SIGNAL_TOKENS = 4096
"""Tokens whose hidden states are on the GPU at once for a signal."""
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker stands in its policy."""

    data: int
    context: int
    tensor: int
    """Its ranks."""
    last: bool
    """It has the output layer."""
    columns: int
    """Its columns of the vocabulary, padding included, if it has the output layer."""


class TeacherMethods:
    """Mixed into a policy worker of NeMo-RL, whose attributes it uses. Every method is collective over the workers."""

    model: Any
    optimizer: Any
    scheduler: Any
    _self_teacher: SelfTeacher | None = None
    _kept: KeptTargets | None = None
    _external_head_VH: Tensor | None = None
    """An external teacher's head, which stays since it does not change."""

    def start_teacher(self, *, kind: Literal["ema", "frozen"], directory: str | None) -> None:
        """Keep a self-teacher beside the student: its present weights, or those saved in `directory`."""
        self._self_teacher = SelfTeacher(self._share(), torch.float32 if kind == "ema" else None)
        if directory is not None:
            self._self_teacher.load(Path(directory))

    def follow_student(self, *, rate: float) -> None:
        """Move the teacher towards the student by `rate`."""
        assert self._self_teacher is not None
        self._self_teacher.follow(self._main_weights(), rate)

    def save_teacher(self, *, directory: str) -> None:
        """Write the teacher, each part once."""
        assert self._self_teacher is not None
        self._self_teacher.save(Path(directory))

    def score_responses(self, *, data: Any, k: int, vocab_size: int, self_teacher: bool, dtype: str) -> Scored | None:
        """Scores of response tokens by the student or by its self-teacher. See the backend's `score_responses`."""
        with self._self_teacher_inside() if self_teacher else nullcontext():
            scores = self._score(data, k, vocab_size, DTYPES[dtype])
        return None if scores is None else {name: part.numpy() for name, part in scores.items()}

    def keep_targets(
        self,
        *,
        data: Any,
        role: Literal["support", "teacher", "contrast"],
        k: int,
        vocab_size: int,
        self_teacher: bool,
        dtype: str,
        hidden: bool,
        contrast: tuple[float, bool],
    ) -> Scored | None:
        """Score as `score_responses` does and keep the answers here, by the rows' `keys`, for their update.

        Args:
            data: also with `keys` [B].
            role: `support`: what this model finds likeliest is what the teacher is asked about next. `teacher`: the
                target. `contrast`: the teacher given failures, set against the target that is here already.
            hidden: keep hidden states and the head, not log-probabilities.
            contrast: β and whether there is a tail.

        Returns:
            The `counts` alone; None where the model's last pipeline stage is elsewhere.
        """
        kept = self._kept = self._kept or KeptTargets()
        keys, lengths = data["keys"].tolist(), (data["input_lengths"] - data["prompt_lengths"]).tolist()
        supports = None if hidden or role == "support" else kept.supports(keys, lengths)
        if supports is not None:
            data["candidates"] = supports
        with self._self_teacher_inside() if self_teacher else nullcontext():
            scores = self._score(data, k, vocab_size, DTYPES[dtype], hidden)
            if scores is not None and hidden:
                kept.keep_head(scores.pop("head"))
        kept.elsewhere = scores is None
        if scores is None:
            return None
        if hidden:
            kept.keep(keys, lengths, {"second" if role == "contrast" else "hidden": scores["hidden"]})
        elif role == "contrast":
            kept.contrast(keys, lengths, scores["logprobs"], *contrast)
        else:
            kept.keep(keys, lengths, {name: scores[name] for name in ("ids", "logprobs")})
        return {"counts": scores["counts"].numpy()}

    def token_signal(
        self, *, data: Any, k: int, vocab_size: int, self_teacher: bool, dtype: str, objective: Divergence
    ) -> Scored | None:
        """What student and teacher say of each response token, from the hidden states that are kept of the teacher.

        Args:
            data: with `keys` [B] of `keep_targets`.
            k: likeliest tokens to tell.
            self_teacher, dtype: of every method that scores; not read, since the student is read in float32.

        Returns:
            The numbers of `TokenSignal` by name; None where the model's last pipeline stage is elsewhere.
        """
        scores = self._score(data, k, vocab_size, torch.float32, hidden=True)
        if scores is None:
            return None
        prompts, lengths = data["prompt_lengths"].tolist(), data["input_lengths"].tolist()
        ids_T = torch.cat([ids[p:n] for ids, p, n in zip(data["input_ids"], prompts, lengths, strict=True)])
        kept, head_VH, device = self._kept or KeptTargets(), scores["head"].detach(), scores["head"].device
        columns = kept.columns(data["keys"].tolist(), [n - p for p, n in zip(prompts, lengths, strict=True)])
        teacher_head_VH = kept.head(device) if columns else head_VH
        assert teacher_head_VH is not None
        hidden = {name: torch.cat(parts_T) for name, parts_T in columns.items()}
        own_TH, parts = scores["hidden"], []
        for some in torch.arange(len(ids_T)).split(SIGNAL_TOKENS):
            student = Head(own_TH[some].to(device), head_VH)
            # A rank without a taught row has filler alone, whose numbers nobody reads.
            given = {name: Head(part_TH[some].to(device), teacher_head_VH) for name, part_TH in hidden.items()}
            teacher = given.get("teacher_hidden", student)
            contrast = given.get("teacher_second", teacher) if objective.reads_contrast else None
            tokens = Tokens(ids_T[some].to(device))
            vocab = Vocab(self._tensor_group(), vocab_size)
            parts.append(read_tokens(objective, student, tokens, teacher, contrast=contrast, top=k, vocab=vocab))
        return _signal_columns(parts)

    def forget_targets(self) -> bool:
        """Give the memory of kept targets back.

        Returns:
            Whether this worker needs an external teacher's head.
        """
        self._kept = None
        return self._external_head_VH is None and self._place().last

    def hand_over(self, *, rank_of: Mapping[int, int], head: bool) -> dict[str, list[tuple[int, Any]]]:
        """Put kept targets into Ray's object store for the workers of another policy, and forget them here.

        Args:
            rank_of: the data-parallel rank there of each row, by key.
            head: also the head.

        Returns:
            References with a rank: `rows`, with one there; `head`, with the tensor-parallel one here. Of the workers
            with the same rows, or the same part of the head, one gives them.
        """
        import ray

        kept, place, self._kept = self._kept or KeptTargets(), self._place(), None
        found: dict[str, list[tuple[int, Any]]] = {"rows": [], "head": []}
        if place.last and place.context == 0 and place.tensor == 0:
            found["rows"] = [(rank, ray.put(part)) for rank, part in kept.packed(rank_of).items()]
        if place.last and place.context == 0 and place.data == 0 and head and kept.head_VH is not None:
            found["head"] = [(place.tensor, ray.put(as_array(kept.head_VH)))]
        return found

    def take_over(self, *, parts: Sequence[Any], heads: Sequence[Any]) -> None:
        """Keep what the workers of another policy have handed over.

        Args:
            parts: references to the rows of this data-parallel rank.
            heads: to the shards of the head; none if it is here.
        """
        import ray

        kept, place = KeptTargets(), self._place()
        kept.elsewhere = not place.last
        if place.last:
            for part in parts:
                kept.take(ray.get(part))
            if heads:
                kept.keep_columns(ray.get(list(heads)), place.tensor * place.columns, place.columns)
                self._external_head_VH = kept.head_VH
            kept.head_VH = self._external_head_VH
        self._kept = kept

    def train(self, data: Any, loss_fn: Any, *args: Any, **own: Any) -> Any:
        """NeMo-RL's update, of a batch whose rows have kept targets where it has `keys`."""
        if "keys" in data:
            kept = self._kept or KeptTargets()
            if not kept.elsewhere:
                lengths = (data["input_lengths"] - data["prompt_lengths"]).tolist()
                data.update(kept.columns(data["keys"].tolist(), lengths))
                loss_fn.teacher_head = kept.head(next(self.model.parameters()).device)
        return super().train(data, loss_fn, *args, **own)  # type: ignore[misc]

    def set_learning_rate(self, *, rate: float) -> None:
        """Set the rate of the next update. The backend's own schedule sets it again after that update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)

    def seed_dropout(self, *, seed: str) -> None:
        """Draw the next update's dropout by the seed and by how much was trained on before, which a checkpoint has.

        NeMo-RL does not restore generators. Tensor ranks, which read the same input, drop the same of it.
        """
        place = self._place()
        torch.manual_seed(seed_of(f"{seed}/dropout/{self.scheduler.num_steps}/{place.data}/{place.context}"))

    @contextmanager
    def _self_teacher_inside(self) -> Iterator[None]:
        """Inside, the model has the teacher's weights. Its own are restored at the end, after an error too.

        Each rank sets its share of the student aside, since no optimiser is sure to have it: Transformer Engine's keeps
        only the low 16 bits beside weights in bfloat16, and NeMo-RL moves its state to the host before scoring.
        """
        assert self._self_teacher is not None
        with self._whole_parameters():
            share = self._share()
            student = {name: part.values.clone() for name, part in share.items()}
            try:
                self._self_teacher.write(share)
                self._gather()
                yield
            finally:
                for name, part in share.items():
                    part.values.copy_(student[name])
                self._gather()

    def _score(self, data: Any, k: int, vocab_size: int, dtype: torch.dtype, hidden: bool = False) -> Scores | None:
        raise NotImplementedError

    def _place(self) -> Place:
        raise NotImplementedError

    def _tensor_group(self) -> Any:
        """The process group over which the output layer's columns are cut."""
        raise NotImplementedError

    def _share(self) -> Share:
        """The part of the weights whose self-teacher this rank keeps: here its shards, all of them."""
        return {
            f"{self._shard_name()}.{name}": Part(local.view(-1), 0, tuple(local.shape))
            for name, local in _shards(self.model)
        }

    def _shard_name(self) -> str:
        """A name of this rank's shards of the weights. Ranks with the same shards give the same."""
        raise NotImplementedError

    def _main_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The share as precisely as the optimiser has it: names and values."""
        return ((name, part.values) for name, part in self._share().items())

    def _gather(self) -> None:
        """Complete the weights of all ranks after each has written its share."""

    def _whole_parameters(self) -> AbstractContextManager[None]:
        """Inside, all parameters are up to date, and no forward pass gathers them."""
        return nullcontext()


def _signal_columns(parts: Sequence[tuple[Reading, Reading, Tensor]]) -> Scored:
    """Numbers of a `TokenSignal`, of all tokens."""
    columns: dict[str, list[Tensor]] = {}
    for student, teacher, divergence_T in parts:
        found = {"student": student.sampled_T, "teacher": teacher.sampled_T, "divergence": divergence_T}
        for name, reading in (("student", student), ("teacher", teacher)):
            found |= {f"{name}_top_ids": reading.top.ids_TK, f"{name}_top": reading.top.logprobs_TK}
        for name, part in found.items():
            columns.setdefault(name, []).append(part)
    return {name: torch.cat(own).cpu().numpy() for name, own in columns.items()}


def _shards(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters; of a DTensor the local shard."""
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        yield name, weight.to_local() if isinstance(weight, DTensor) else weight
