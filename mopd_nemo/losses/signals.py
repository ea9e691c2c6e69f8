"""What to watch while distilling: entropies, top-k mass and overlap, and the sampler's agreement with the trainer.

Shape suffixes: C tokens, K tokens of a top-k, N chosen tokens, D distributions: student and, with logits, teacher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd_nemo.losses.dense import Chunk
from mopd_nemo.losses.sources import Tokens


@dataclass(frozen=True, slots=True)
class Look:
    """What one pass over a chunk's logits has found.

    Attributes:
        ids: chosen token ids by name: `support`, `sampled`, `student_top`, `teacher_top`.
        logprobs_DCN: their log-probabilities; `teacher_top` has none.
        entropies: of the D distributions, where signals are wanted.
        given_CK: the teacher's log-probabilities of the support, where it has no logits.
    """

    ids: dict[str, Tensor]
    logprobs_DCN: dict[str, Tensor]
    entropies: list[Tensor]
    given_CK: Tensor | None


def entropy(chunk: Chunk) -> Tensor:
    """-Σ P log P of each row, in nats."""
    assert chunk.mean_C is not None
    return -chunk.mean_C if chunk.lse_C is None else chunk.lse_C - chunk.mean_C


def signal_names(teacher_logits: bool, teacher_topk: bool, sampler: bool) -> list[str]:
    """Which signals there are: the same on every rank, whether or not it has tokens."""
    names = ["student/entropy", "student/topk_mass"]
    if teacher_logits:
        names += ["teacher/entropy", "teacher/topk_mass", "teacher/advantage"]
    if teacher_logits or teacher_topk:
        names.append("topk_overlap")
    return [*names, "sampler/gap", "sampler/ratio"] if sampler else names


def signals(look: Look, tokens: Tokens) -> dict[str, Tensor]:
    """Per-token diagnostics; those that need what is not there, such as a teacher's logits, are left out.

    `student/entropy`, `teacher/entropy`: nats.
    `student/topk_mass`: P's mass on its own k likeliest tokens; `teacher/topk_mass`: Q's mass on the same tokens.
    `topk_overlap`: share of P's k likeliest tokens that are also among Q's.
    `teacher/advantage`: log Q(y_t) - log P(y_t) of the sampled token; negative where the teacher disagrees.
    `sampler/gap`: |log P(y_t) - sampler's log-probability|; only rounding when sampling at temperature 1.
    `sampler/ratio`: P(y_t) / the sampler's probability, before any clipping; 1 on average for an exact sampler.
    """
    mass_DC = look.logprobs_DCN["student_top"].exp().sum(-1)
    sampled_DC = look.logprobs_DCN["sampled"].squeeze(-1)
    found = {"student/entropy": look.entropies[0], "student/topk_mass": mass_DC[0]}
    if len(look.entropies) == 2:
        found["teacher/entropy"] = look.entropies[1]
        found["teacher/topk_mass"] = mass_DC[1]
        found["teacher/advantage"] = sampled_DC[1] - sampled_DC[0]
    if "teacher_top" in look.ids:
        found["topk_overlap"] = _overlap(look.ids["student_top"], look.ids["teacher_top"])
    if tokens.sampler_logprobs_T is not None:
        log_ratio_C = sampled_DC[0] - tokens.sampler_logprobs_T
        found |= {"sampler/gap": log_ratio_C.abs(), "sampler/ratio": log_ratio_C.exp()}
    return found


def _overlap(ids_CK: Tensor, others_CK: Tensor) -> Tensor:
    """Share of each row's ids that the other has too; neither repeats an id."""
    sorted_CK = others_CK.sort(-1).values
    nearest_CK = torch.searchsorted(sorted_CK, ids_CK).clamp(max=sorted_CK.shape[-1] - 1)
    return (sorted_CK.gather(-1, nearest_CK) == ids_CK).float().mean(-1)
