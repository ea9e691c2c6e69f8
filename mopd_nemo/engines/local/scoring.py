"""Log-probabilities of given responses. A prompt that several responses follow is read once.

Shape suffixes: U distinct prompts of a batch, B prompt-response pairs, P prompt positions, R response positions,
T response tokens laid end to end, C tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mopd_nemo.engines.base import Progress
from mopd_nemo.engines.local.batching import left_padded, positions_of
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.errors import UserError

LOGIT_BUDGET = 2**26
"""Logits of one chunk of response tokens, counted as tokens × vocabulary: 256 MiB in float32."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Unit:
    """One prompt and some of the responses that follow it."""

    prompt: Ids
    responses: tuple[Ids, ...]

    @property
    def width(self) -> int:
        return len(self.prompt) + max(len(response) for response in self.responses)


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
        prompts: one per response; equal ones share one forward pass, equal pairs are computed once.
        responses: token ids, at least one each.
        max_tokens: padded tokens that a batch may hold, keys and values of shared prompts counted for each response.

    Raises:
        UserError: a pair is longer than the model's positions.
    """
    _check_lengths(model, prompts, responses)
    found: dict[tuple[Ids, Ids], tuple[float, ...]] = {}
    batches = _batches(_units(prompts, responses, max_tokens), max_tokens)
    for number, batch in enumerate(batches, start=1):
        with model.computing():
            scores = _score(model, batch)
        pairs = [(unit.prompt, response) for unit in batch for response in unit.responses]
        found.update(zip(pairs, scores, strict=True))
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


def _units(prompts: Sequence[Ids], responses: Sequence[Ids], max_tokens: int) -> list[_Unit]:
    """Distinct responses of each distinct prompt, in pieces that fit a batch."""
    after: dict[Ids, dict[Ids, None]] = {}
    for prompt, response in zip(prompts, responses, strict=True):
        after.setdefault(prompt, {})[response] = None
    units = []
    for prompt, distinct in after.items():
        whole = _Unit(prompt, tuple(distinct))
        size = max(max_tokens // whole.width, 1)
        units += [_Unit(prompt, whole.responses[i : i + size]) for i in range(0, len(whole.responses), size)]
    return units


def _batches(units: Sequence[_Unit], max_tokens: int) -> list[list[_Unit]]:
    """Units of similar prompt length together, longest first, within the token budget."""
    batches: list[list[_Unit]] = []
    rows = width = 0
    for unit in sorted(units, key=lambda u: -len(u.prompt)):
        rows, width = rows + len(unit.responses), max(width, unit.width)
        if not batches or rows * width > max_tokens:
            batches.append([])
            rows, width = len(unit.responses), unit.width
        batches[-1].append(unit)
    return batches


def _score(model: LanguageModel, units: Sequence[_Unit]) -> list[tuple[float, ...]]:
    """Read the prompts, copy their keys and values once per response, read the responses."""
    device = model.device
    mask_UP, ids_UP = left_padded([unit.prompt for unit in units], device)
    output = model.module.base_model(
        input_ids=ids_UP, attention_mask=mask_UP, position_ids=positions_of(mask_UP), use_cache=True
    )
    counts = torch.tensor([len(unit.responses) for unit in units], device=device)
    owner_B = torch.arange(len(units), device=device).repeat_interleave(counts)
    responses = [torch.tensor(response, device=device) for unit in units for response in unit.responses]
    last_BH = output.last_hidden_state[owner_B, -1]  # predicts the first response token
    hidden_BRH = last_BH.unsqueeze(1)
    ids_BR = pad_sequence(responses, batch_first=True)
    if ids_BR.shape[1] > 1:
        cache, mask_BP = output.past_key_values, mask_UP[owner_B]
        cache.batch_select_indices(owner_B)
        fed_BR = ids_BR[:, :-1]  # the last token predicts nothing that is asked for
        positions_BR = mask_BP.sum(-1, keepdim=True) + torch.arange(fed_BR.shape[1], device=device)
        later_BRH = model.module.base_model(
            input_ids=fed_BR,
            attention_mask=torch.cat([mask_BP, torch.ones_like(fed_BR)], dim=1),  # padding comes last: causality
            position_ids=positions_BR,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        hidden_BRH = torch.cat([hidden_BRH, later_BRH], dim=1)
    lengths = [len(response) for response in responses]
    hidden_TH = torch.cat([row[:length] for row, length in zip(hidden_BRH, lengths, strict=True)])
    logprobs = _logprobs_of(model, hidden_TH, torch.cat(responses)).split(lengths)
    return [tuple(row.tolist()) for row in logprobs]


def _logprobs_of(model: LanguageModel, hidden_TH: Tensor, ids_T: Tensor) -> Tensor:
    chunk = max(LOGIT_BUDGET // model.module.config.vocab_size, 1)
    parts = []
    for hidden_CH, ids_C in zip(hidden_TH.split(chunk), ids_T.split(chunk), strict=True):
        logits_CV = model.head(hidden_CH).float()
        parts.append(logits_CV.gather(-1, ids_C.unsqueeze(-1)).squeeze(-1) - logits_CV.logsumexp(-1))
    return torch.cat(parts).cpu()
