"""What a student and its teacher say of each response token: for looking at, not for learning.

Shape suffixes: T response tokens, K likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mopd_nemo.losses.logits import Head, Logits, Tokens, TopK
from mopd_nemo.losses.objectives import Divergence
from mopd_nemo.losses.token_loss import token_loss
from mopd_nemo.losses.vocab import Vocab, logprobs_of, topk_logprobs

CHUNK = 256
"""Rows whose logits are held at once."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One model's distributions."""

    sampled_T: Tensor
    """Log-probability of the sampled token, nats."""
    top: TopK
    """The likeliest tokens, likeliest first."""


@torch.no_grad()
def read_tokens(
    objective: Divergence,
    student: Head | Logits,
    tokens: Tokens,
    teacher: Head | Logits,
    *,
    contrast: Head | Logits | None = None,
    top: int = 1,
    vocab: Vocab | None = None,
) -> tuple[Reading, Reading, Tensor]:
    """Readings of student and teacher, and divergence_T: the objective of each token before any weight of its response.

    With a contrast the teacher's reading is that of the teacher given successes; the divergence is to the contrast.

    Args:
        vocab: as in `token_loss`, whose collectives these are.
    """
    vocab = vocab or Vocab()
    divergence_T = token_loss(objective, student, tokens, teacher, contrast=contrast, vocab=vocab).loss_T
    return _reading(student, tokens, top, vocab), _reading(teacher, tokens, top, vocab), divergence_T


def _reading(model: Head | Logits, tokens: Tokens, top: int, vocab: Vocab) -> Reading:
    rows = model.rows(vocab.shard(model.width), model.compute_dtype)
    sampled, ids, logprobs = [], [], []
    for start in range(0, model.num_tokens, CHUNK):
        part = slice(start, min(start + CHUNK, model.num_tokens))
        logits_CV = rows.logits(part)
        sampled.append(logprobs_of(logits_CV, tokens.ids_T[part, None], vocab).squeeze(-1))
        ids_CK, logprobs_CK = topk_logprobs(logits_CV, top, vocab)
        ids.append(ids_CK)
        logprobs.append(logprobs_CK)
    return Reading(torch.cat(sampled), TopK(torch.cat(ids), torch.cat(logprobs)))
