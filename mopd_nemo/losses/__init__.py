"""Losses per response token: pure functions of logits and hidden states, no models.

Shape suffixes: T response tokens (any number of responses laid end to end), V vocabulary, K support, H hidden size.
"""

from mopd_nemo.losses.aggregate import Aggregation, step_lengths, step_weights, token_weights
from mopd_nemo.losses.divergence import sampled_reverse_kl, token_divergence
from mopd_nemo.losses.objectives import Divergence, LogLikelihood, Objective, PolicyGradient, SampledReverseKL
from mopd_nemo.losses.policy import clipped_policy_gradient, group_advantages, importance_weights
from mopd_nemo.losses.preference import dpo_loss, simpo_loss
from mopd_nemo.losses.sources import Head, Logits, Tokens, TopK
from mopd_nemo.losses.token_loss import TokenLoss, token_loss
from mopd_nemo.losses.vocab import Vocab

__all__ = [
    "Aggregation",
    "Divergence",
    "Head",
    "LogLikelihood",
    "Logits",
    "Objective",
    "PolicyGradient",
    "SampledReverseKL",
    "TokenLoss",
    "Tokens",
    "TopK",
    "Vocab",
    "clipped_policy_gradient",
    "dpo_loss",
    "group_advantages",
    "importance_weights",
    "sampled_reverse_kl",
    "simpo_loss",
    "step_lengths",
    "step_weights",
    "token_divergence",
    "token_loss",
    "token_weights",
]
