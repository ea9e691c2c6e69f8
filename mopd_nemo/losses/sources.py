"""Where a distribution over the vocabulary comes from, and the tokens that it is asked about.

Shape suffixes: T response tokens, R rows of logits of which T are response tokens, V vocabulary (the local columns when
it is sharded), H hidden size, K support.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits that exist already.

    Attributes:
        logits_RV: any float type.
        rows_T: the rows of the response tokens; None when every row is one.
    """

    logits_RV: Tensor
    rows_T: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.logits_RV.shape[0] if self.rows_T is None else self.rows_T.shape[0]

    @property
    def width(self) -> int:
        return self.logits_RV.shape[-1]


@dataclass(frozen=True, slots=True)
class Head:
    """Hidden states and the LM head that turns them into logits, a few rows at a time.

    Attributes:
        hidden_TH: hidden states of the response tokens alone, whole on every rank.
        weight_VH: rows of the LM head.
        bias_V: its bias, if any.

    The logits have the type of the weight, or autocast's inside its context.
    """

    hidden_TH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.hidden_TH.shape[0]

    @property
    def width(self) -> int:
        return self.weight_VH.shape[0]

    @property
    def compute_dtype(self) -> torch.dtype:
        device = self.weight_VH.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight_VH.dtype


@dataclass(frozen=True, slots=True)
class TopK:
    """A teacher's likeliest tokens.

    Attributes:
        ids_TK: global token ids, each at most once in a row.
        logprobs_TK: their log-probabilities under the *full-vocabulary* normalisation, so that the mass outside is
            known.
    """

    ids_TK: Tensor
    logprobs_TK: Tensor

    @property
    def num_tokens(self) -> int:
        return self.ids_TK.shape[0]

    def __getitem__(self, part: slice) -> TopK:
        return TopK(self.ids_TK[part], self.logprobs_TK[part])


@dataclass(frozen=True, slots=True)
class Tokens:
    """The sampled response tokens, laid end to end, and what is known about each.

    Attributes:
        ids_T: sampled token ids.
        advantages_T: for a policy gradient.
        old_logprobs_T: log-probabilities of the policy that a policy-gradient ratio refers to; None means this one.
        sampler_logprobs_T: log-probabilities that the sampler reported.
    """

    ids_T: Tensor
    advantages_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    sampler_logprobs_T: Tensor | None = None

    def __getitem__(self, part: slice) -> Tokens:
        cut = [
            None if x is None else x[part] for x in (self.advantages_T, self.old_logprobs_T, self.sampler_logprobs_T)
        ]
        return Tokens(self.ids_T[part], *cut)
