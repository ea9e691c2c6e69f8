"""Batched sampling with a key-value cache. Each prompt is read once, however many responses it gets.

Shape suffixes: B sequences being decoded, S prompt positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mopd_nemo.engines.base import Progress, Sampling
from mopd_nemo.engines.local.batching import left_padded, positions_of
from mopd_nemo.engines.local.model import LanguageModel

COMPACT_BELOW = 0.75
"""Finished sequences leave the batch when fewer than this fraction of it are still being decoded."""

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
    device = model.device
    mask_BS, ids_BS = left_padded(prompts, device)
    output = model.module(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        position_ids=positions_of(mask_BS),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(num_samples)
    logits_BV = output.logits[:, -1].repeat_interleave(num_samples, dim=0)
    mask_BS = mask_BS.repeat_interleave(num_samples, dim=0)
    positions_B = mask_BS.sum(-1)
    active_B = torch.arange(len(logits_BV))  # number of the sequence that each row of the batch decodes
    results: list[tuple[list[int], list[float]]] = [([], []) for _ in range(len(logits_BV))]
    for step in range(sampling.max_tokens):
        tokens_B, logprobs_B = draw(logits_BV, uniforms[step, active_B].to(device), sampling)
        running: list[int] = []
        for row, (number, token, logprob) in enumerate(
            zip(active_B.tolist(), tokens_B.tolist(), logprobs_B.tolist(), strict=True)
        ):
            ids, logprobs = results[number]
            if ids and ids[-1] in eos_ids:
                continue  # finished, but still in the batch
            ids.append(token)
            logprobs.append(logprob)
            if token in eos_ids or step + 1 == sampling.max_tokens:
                on_sequence(number, ids, logprobs)
            else:
                running.append(row)
        if not running:
            break
        if len(running) < COMPACT_BELOW * len(active_B):
            rows = torch.tensor(running)
            active_B, rows = active_B[rows], rows.to(device)
            cache.batch_select_indices(rows)
            tokens_B, mask_BS, positions_B = tokens_B[rows], mask_BS[rows], positions_B[rows]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(mask_BS), 1)], dim=1)
        logits_BV = model.module(
            input_ids=tokens_B.unsqueeze(1),
            attention_mask=mask_BS,
            position_ids=positions_B.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        positions_B = positions_B + 1
    return results


def draw(logits_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution at a uniform number.

    Returns:
        tokens_B, and logprobs_B under the distribution drawn from (temperature and top-p applied).
    """
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_p < 1.0:
        logits_BV = _nucleus(logits_BV, sampling.top_p)
    logprobs_BV = logits_BV.log_softmax(-1)
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    points_B1 = (uniforms_B * cumulative_BV[:, -1]).unsqueeze(-1)
    # Strictly above the point: a token of probability zero has no width and cannot be hit.
    tokens_B1 = torch.searchsorted(cumulative_BV, points_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B1.squeeze(-1), logprobs_BV.gather(-1, tokens_B1).squeeze(-1)


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens whose mass before them is below `top_p`; the likeliest always stays."""
    sorted_BV, order_BV = logits_BV.sort(-1, descending=True)
    probabilities_BV = sorted_BV.softmax(-1)
    drop_BV = probabilities_BV.cumsum(-1) - probabilities_BV >= top_p
    return logits_BV.masked_fill(drop_BV.scatter(-1, order_BV, drop_BV), float("-inf"))


def _uniforms(seed: str, num_positions: int, num_samples: int) -> Tensor:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(number)
    return torch.rand(num_positions, num_samples, generator=generator, dtype=torch.float64)
