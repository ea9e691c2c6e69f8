"""Log-probabilities of given responses. Shared prefixes are computed once.

Shape suffixes: T response tokens laid end to end, C tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mopd_nemo.config import UserError
from mopd_nemo.engines.base import Progress
from mopd_nemo.engines.local.model import LanguageModel

LOGIT_BUDGET = 2**26
"""Logits of one chunk of response tokens, counted as tokens × vocabulary: 256 MiB in float32."""

Ids = tuple[int, ...]


@torch.inference_mode()
def response_logprobs(
    model: LanguageModel,
    prompts: Sequence[Ids],
    responses: Sequence[Ids],
    *,
    max_tokens: int,
    on_progress: Progress | None = None,
) -> list[tuple[float, ...]]:
    """Log-probability (nats, temperature 1) of every response token after its prompt, in order.

    Args:
        prompts: one per response; equal pairs are computed once.
        responses: token ids, at least one each.
        max_tokens: of a batch, as `LanguageModel.batches` counts them.

    Raises:
        UserError: a pair is longer than the model's positions.
    """
    _check_lengths(model, prompts, responses)
    pairs = list(dict.fromkeys(zip(prompts, responses, strict=True)))
    found: dict[tuple[Ids, Ids], tuple[float, ...]] = {}
    batches = model.batches([[prompt + response] for prompt, response in pairs], max_tokens)
    for number, batch in enumerate(batches, start=1):
        chosen = [pairs[i] for i in batch]
        ids_T = torch.tensor([token for _, response in chosen for token in response], device=model.device)
        with model.computing():
            hidden_TH = model.response_hidden_TH(*zip(*chosen, strict=True))
            logprobs_T = _logprobs_of(model, hidden_TH, ids_T)
        scores = logprobs_T.split([len(response) for _, response in chosen])
        found.update(zip(chosen, (tuple(score.tolist()) for score in scores), strict=True))
        if on_progress:
            on_progress(number / len(batches))
    return [found[pair] for pair in zip(prompts, responses, strict=True)]


def _check_lengths(model: LanguageModel, prompts: Sequence[Ids], responses: Sequence[Ids]) -> None:
    limit = getattr(model.module.config, "max_position_embeddings", None)
    longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
    if limit is not None and longest > limit:
        raise UserError(
            f"a prompt with its response has {longest} tokens, the model {limit} positions: "
            "lower peers.max_context_tokens or leave out the longest responses"
        )


def _logprobs_of(model: LanguageModel, hidden_TH: Tensor, ids_T: Tensor) -> Tensor:
    chunk = max(LOGIT_BUDGET // model.module.config.vocab_size, 1)
    parts = []
    for hidden_CH, ids_C in zip(hidden_TH.split(chunk), ids_T.split(chunk), strict=True):
        logits_CV = model.head(hidden_CH).float()
        parts.append(logits_CV.gather(-1, ids_C.unsqueeze(-1)).squeeze(-1) - logits_CV.logsumexp(-1))
    return torch.cat(parts).cpu()
