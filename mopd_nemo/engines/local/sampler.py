"""Batched sampling with a key-value cache. Each prompt is read once for all its responses.

Shape suffixes: B sequences being decoded, N all sequences, T response positions, V vocabulary, J blocks of it, W tokens
of a block, C likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mopd_nemo.engines.base import Progress, Sampling
from mopd_nemo.engines.local.batching import compact_order
from mopd_nemo.engines.local.decoding import read_prompts
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.seeds import seed_of

BLOCK = 64
"""Tokens of the vocabulary whose probabilities are summed together before one of them is looked for."""
NUCLEUS = 256
"""Likeliest tokens among which the nucleus is looked for first."""

OnSequence = Callable[[int, list[int], list[float]], None]
"""Called with a sequence's number, its token ids and their log-probabilities, as soon as it is finished."""


@torch.inference_mode()
def sample(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    num_samples: int,
    sampling: Sampling,
    *,
    eos_ids: frozenset[int],
    seed: str,
    batch_size: int,
    on_progress: Progress | None = None,
    on_sequence: OnSequence = lambda *_: None,
) -> list[tuple[list[int], list[float]]]:
    """Responses, `num_samples` for each prompt, prompt by prompt: (token ids with the end token, log-probabilities).

    Every draw is a function of the seed, the prompt's number, the sample's number and the position alone, so batching
    changes nothing but rounding.
    """
    prompts_per_batch = max(batch_size // num_samples, 1)
    results: list[tuple[list[int], list[float]]] = []

    def finished(number: int, ids: list[int], logprobs: list[float]) -> None:
        on_sequence(len(results) + number, ids, logprobs)

    for start in range(0, len(prompts), prompts_per_batch):
        stop = min(start + prompts_per_batch, len(prompts))
        uniforms = [_uniforms(f"{seed}/{number}", sampling.max_tokens, num_samples) for number in range(start, stop)]
        with model.computing():
            draws = torch.cat(uniforms, dim=1)
            results += _decode(model, prompts[start:stop], num_samples, sampling, eos_ids, draws, finished)
        if on_progress:
            on_progress(stop / len(prompts))
    return results


def _decode(
    model: LanguageModel,
    prompts: Sequence[tuple[int, ...]],
    num_samples: int,
    sampling: Sampling,
    eos_ids: frozenset[int],
    uniforms: Tensor,
    on_sequence: OnSequence,
) -> list[tuple[list[int], list[float]]]:
    logits_BV, decoder = read_prompts(model, prompts, num_samples, sampling.max_tokens)
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
            order_B = compact_order(ended_B)
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
    """Where the cumulative sum first exceeds the uniform share of the whole: first the block, then the token in it.

    A cumulative sum of a whole vocabulary goes step by step; sums of blocks do not.
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
    """Strictly above, so that what has no width is never hit; a point that rounding put at the end counts as before."""
    return torch.searchsorted(sums_BJ, points_B1.minimum(sums_BJ[:, -1:] * (1 - 1e-12)), right=True)


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens whose mass before them is below `top_p`, and those just as likely as the last one.

    Few tokens hold that mass as a rule; where they do not, the whole vocabulary is sorted.
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
