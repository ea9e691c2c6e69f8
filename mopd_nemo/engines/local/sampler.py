"""Batched sampling with a key-value cache. Each prompt is read once for all its responses.

Shape suffixes: B sequences being decoded, N all sequences, T response positions, R rows of the model's own cache,
U distinct prompts, P prompt positions, V vocabulary, J blocks of it, W tokens of a block, C likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from mopd_nemo.engines.base import Progress, Request, Sampling, seed_of
from mopd_nemo.engines.local import llama
from mopd_nemo.engines.local.model import LanguageModel

BLOCK = 64
"""Tokens whose probabilities are summed first: a draw picks a block, then a token within it."""
NUCLEUS = 256
"""Likeliest tokens that are searched for the nucleus before the whole vocabulary is sorted."""
COMPACT_BELOW = 0.75
"""`ModuleDecoder` copies its cache without the finished sequences when fewer than this fraction of its rows run."""

OnSequence = Callable[[int, list[int], list[float]], None]
"""Called with the index of a sequence, its token ids and their log-probabilities, as soon as it is finished."""


@torch.inference_mode()
def sample(
    model: LanguageModel,
    request: Request,
    *,
    eos_ids: frozenset[int],
    batch_size: int,
    on_progress: Progress | None = None,
    on_sequence: OnSequence = lambda *_: None,
) -> list[tuple[list[int], list[float]]]:
    """Responses, prompt by prompt: (token ids with the end token, log-probabilities).

    Every draw is a function of the seed, the prompt's index, the sample's index and the position alone. So batching
    changes only rounding.
    """
    prompts, count = request.prompts, request.num_samples
    prompts_per_batch = max(batch_size // count, 1)
    results: list[tuple[list[int], list[float]]] = []

    def finished(number: int, ids: list[int], logprobs: list[float]) -> None:
        on_sequence(len(results) + number, ids, logprobs)

    for start in range(0, len(prompts), prompts_per_batch):
        stop = min(start + prompts_per_batch, len(prompts))
        uniforms = [_uniforms(f"{request.seed}/{n}", request.sampling.max_tokens, count) for n in range(start, stop)]
        with model.computing():
            draws = torch.cat(uniforms, dim=1)
            results += _decode(model, replace(request, prompts=prompts[start:stop]), eos_ids, draws, finished)
        if on_progress:
            on_progress(stop / len(prompts))
    return results


def _decode(
    model: LanguageModel,
    request: Request,
    eos_ids: frozenset[int],
    uniforms: Tensor,
    on_sequence: OnSequence,
) -> list[tuple[list[int], list[float]]]:
    sampling = request.sampling
    logits_BV, decoder = read_prompts(model, request.prompts, request.num_samples, sampling.max_tokens)
    device, total = model.device, len(logits_BV)
    uniforms, ends = uniforms.to(device), torch.tensor(sorted(eos_ids), device=device)
    ids_NT = torch.zeros(total, sampling.max_tokens, dtype=torch.long, device=device)
    logprobs_NT = torch.zeros(total, sampling.max_tokens, device=device)
    numbers_B = torch.arange(total, device=device)  # of the sequence that each row of the batch decodes
    results: list[tuple[list[int], list[float]]] = [([], [])] * total
    for step in range(sampling.max_tokens):
        tokens_B, logprobs_B = draw(logits_BV, uniforms[step, numbers_B], sampling)
        ids_NT[numbers_B, step], logprobs_NT[numbers_B, step] = tokens_B, logprobs_B
        ended_B = torch.isin(tokens_B, ends) if step + 1 < sampling.max_tokens else torch.ones_like(tokens_B).bool()
        if ended_B.any():
            ended = numbers_B[ended_B]
            written = (x_NT[ended, : step + 1].tolist() for x_NT in (ids_NT, logprobs_NT))
            for number, *result in zip(ended.tolist(), *written, strict=True):
                results[number] = result[0], result[1]
                on_sequence(number, *results[number])
            order_B = llama.compact_order(ended_B)
            if not len(order_B):
                break
            decoder.keep(order_B)
            tokens_B, numbers_B = tokens_B[order_B], numbers_B[order_B]
        logits_BV = decoder.step(tokens_B)
    return results


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution at a uniform number.

    Returns:
        tokens_B, and logprobs_B under the distribution drawn from (temperature and top-p applied).
    """
    logits_BV = logits_BV.float()
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1.0:
        logits_BV = _nucleus(logits_BV, sampling.top_p)
    probabilities_BV = logits_BV.softmax(-1)
    tokens_B1 = _invert(probabilities_BV, uniforms_B.unsqueeze(-1))
    return tokens_B1.squeeze(-1), probabilities_BV.gather(-1, tokens_B1).squeeze(-1).log()


def _invert(weights_BV: Tensor, uniforms_B1: Tensor) -> Tensor:
    """The first token whose cumulative sum exceeds the uniform share of the total: first its block, then the token.

    A cumulative sum over the whole vocabulary is sequential; sums of blocks are not.
    """
    vocabulary = weights_BV.shape[-1]
    blocks_BJW = pad(weights_BV, (0, -vocabulary % BLOCK)).unflatten(-1, (-1, BLOCK))
    ends_BJ = blocks_BJW.sum(-1, dtype=torch.float64).cumsum(-1)
    points_B1 = uniforms_B1 * ends_BJ[:, -1:]
    block_B1 = _first_above(ends_BJ, points_B1)
    within_BW = blocks_BJW.gather(1, block_B1.unsqueeze(-1).expand(-1, 1, BLOCK)).squeeze(1).double().cumsum(-1)
    before_B1 = ends_BJ.gather(-1, block_B1) - within_BW[:, -1:]
    return block_B1 * BLOCK + _first_above(within_BW, points_B1 - before_B1)


def _first_above(sums_BJ: Tensor, points_B1: Tensor) -> Tensor:
    """The first sum strictly above the point, so that a token of probability 0 is never drawn.

    A point that rounding has moved to the total counts as just below it.
    """
    return torch.searchsorted(sums_BJ, points_B1.minimum(sums_BJ[:, -1:] * (1 - 1e-12)), right=True)


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keep a token if the tokens that are likelier have a mass below `top_p`; ties with the last one are kept too.

    Usually few tokens hold that mass. Otherwise the whole vocabulary is sorted.
    """
    total_B1 = logits_BV.logsumexp(-1, keepdim=True)
    count = min(NUCLEUS, logits_BV.shape[-1])
    sorted_BC = logits_BV.topk(count, dim=-1).values
    probabilities_BC = (sorted_BC - total_B1).exp()
    if count < logits_BV.shape[-1] and (probabilities_BC.sum(-1) < top_p).any():
        sorted_BC = logits_BV.sort(-1, descending=True).values
        probabilities_BC = (sorted_BC - total_B1).exp()
    kept_B1 = (probabilities_BC.cumsum(-1) - probabilities_BC < top_p).sum(-1, keepdim=True)
    least_B1 = sorted_BC.gather(-1, kept_B1 - 1)
    return logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))


def _uniforms(seed: str, num_positions: int, num_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of(seed))
    return torch.rand(num_positions, num_samples, generator=generator, dtype=torch.float64)


class Decoder(Protocol):
    """A batch of sequences and their key-value cache."""

    def step(self, tokens_B: Tensor) -> Tensor:
        """Append a token to each sequence; returns logits_BV of the next."""
        ...

    def keep(self, order_B: Tensor) -> None:
        """Continue with these sequences alone: position i becomes sequence `order_B[i]`."""
        ...


def read_prompts(
    model: LanguageModel, prompts: Sequence[tuple[int, ...]], num_samples: int, max_tokens: int
) -> tuple[Tensor, Decoder]:
    """Read each prompt once, for `num_samples` sequences each, prompt by prompt.

    Args:
        max_tokens: of each response.

    Returns:
        logits_BV of the first token, and the decoder of the others.
    """
    if llama.is_like_llama(model.module):
        return llama.read_prompts(model, prompts, num_samples, max_tokens)
    mask_UP, ids_UP = left_padded(prompts, model.device)
    output = model.module(
        input_ids=ids_UP,
        attention_mask=mask_UP,
        position_ids=positions_of(mask_UP),
        use_cache=True,
        logits_to_keep=1,
    )
    decoder = ModuleDecoder(model, output.past_key_values, mask_UP, num_samples)
    return output.logits[:, -1].repeat_interleave(num_samples, dim=0), decoder


class ModuleDecoder:
    """Decodes with the model's own forward pass.

    Args:
        cache_UP: of the model's forward over the prompts.
        mask_UP: of the prompts, which are padded on the left.
    """

    def __init__(self, model: LanguageModel, cache_UP: Any, mask_UP: Tensor, num_samples: int) -> None:
        self._module = model.module
        self._cache_RP = cache_UP
        self._cache_RP.batch_repeat_interleave(num_samples)
        self._mask_RP = mask_UP.repeat_interleave(num_samples, dim=0)
        self._positions_R = self._mask_RP.sum(-1)
        self._rows_B = torch.arange(len(self._mask_RP), device=model.device)

    def step(self, tokens_B: Tensor) -> Tensor:
        rows = len(self._mask_RP)
        tokens_R = tokens_B.new_zeros(rows).index_copy_(0, self._rows_B, tokens_B)
        self._mask_RP = torch.cat([self._mask_RP, self._mask_RP.new_ones(rows, 1)], dim=1)
        logits_RV = self._module(
            input_ids=tokens_R.unsqueeze(1),
            attention_mask=self._mask_RP,
            position_ids=self._positions_R.unsqueeze(1),
            past_key_values=self._cache_RP,
            use_cache=True,
        ).logits[:, -1]
        self._positions_R = self._positions_R + 1
        return logits_RV if len(self._rows_B) == rows else logits_RV[self._rows_B]

    def keep(self, order_B: Tensor) -> None:
        self._rows_B = self._rows_B[order_B]
        if len(self._rows_B) < COMPACT_BELOW * len(self._mask_RP):
            self._cache_RP.batch_select_indices(self._rows_B)
            self._mask_RP, self._positions_R = self._mask_RP[self._rows_B], self._positions_R[self._rows_B]
            self._rows_B = torch.arange(len(self._rows_B), device=self._rows_B.device)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """mask_BS (1 for real tokens) and ids_BS of prompts, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids_BS = torch.zeros(len(prompts), width, dtype=torch.long)
    mask_BS = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids_BS[i, width - len(prompt) :] = torch.tensor(prompt)
        mask_BS[i, width - len(prompt) :] = 1
    return mask_BS.to(device), ids_BS.to(device)


def positions_of(mask_BS: Tensor) -> Tensor:
    """Position ids that count real tokens only."""
    return (mask_BS.cumsum(-1) - 1).clamp(min=0)
