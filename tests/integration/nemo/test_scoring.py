"""The teacher's forward on real Megatron-Core, against one Hugging Face forward of the same checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import EMBEDDED
from tests.integration.nemo.ranks import run_ranks

K = 8
LENGTHS = ((5, 4), (9, 7), (3, 1), (12, 9))
"""(prompt, response) tokens of the sequences."""


def sequences() -> list[list[int]]:
    """Sequences of different lengths; the seed makes them the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 428, (sum(pair),), generator=generator).tolist() for pair in LENGTHS]


def reference(attention: bool) -> Tensor:
    """Log-probabilities [T, V] of all response positions, from one plain forward per sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    rows = []
    with torch.no_grad():
        for ids, (prompt, _) in zip(sequences(), LENGTHS, strict=True):
            if attention:
                logits = model(torch.tensor([ids])).logits[0]
            else:
                hidden = model.model.embed_tokens(torch.tensor(ids))
                for layer in model.model.layers:
                    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
                logits = model.lm_head(model.model.norm(hidden))
            rows.append(logits[prompt - 1 : -1].log_softmax(-1))
    return torch.cat(rows)


CUTS = {
    "one rank": (1, 1, 1, False, False),
    "packed": (1, 1, 1, True, False),
    "tp2": (2, 1, 1, False, False),
    "tp2, sequence parallel": (2, 1, 1, False, True),
    "pp2": (1, 2, 1, False, False),
    "packed, cp2": (1, 1, 2, True, False),
    "tp2, pp2": (2, 2, 1, False, False),
    "packed, tp2, cp2, sequence parallel": (2, 1, 2, True, True),
    "packed, pp2, cp2": (1, 2, 2, True, False),
}
"""tp, pp, cp, packed, sequence parallel."""


def score_all(cuts: list[str]) -> dict[tuple[str, str], Any]:
    """On each rank and for each cut: what scoring returns, the order of sequences, rows seen by the output layer."""
    results = {}
    for cut in cuts:
        model, data, order, cfg, seen = prepared(*CUTS[cut])
        results[cut, "own"] = scored(model, data, cfg), order, sum(seen)
        data["candidates"] = [candidates()[i] for i in order]
        results[cut, "given"] = scored(model, data, cfg), order, sum(seen)
    return results


def scored(model: Any, data: Any, cfg: dict[str, Any]) -> Any:
    from mopd_nemo.engines.nemo.scoring import score_responses

    return score_responses(model, data, cfg, k=K, vocab_size=428, dtype=torch.float32)


def candidates() -> list[Tensor]:
    """Tokens to score, different for every response position and sequence."""
    spread_K = torch.arange(0, 400, 50)
    return [(torch.arange(number, number + size)[:, None] + spread_K).int() for number, (_, size) in enumerate(LENGTHS)]


def prepared(tp: int, pp: int, cp: int, packed: bool, sequence_parallel: bool) -> tuple[Any, ...]:
    """The model, the batch as NeMo-RL hands it to a worker, and a count of rows."""
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict

    from tests.integration.nemo.qwen3 import build, start_megatron

    start_megatron(tp, pp, cp)
    model = build(EMBEDDED, attention=not packed, sequence_parallel=sequence_parallel, padded_vocab=448)
    seen: list[int] = []
    if model.post_process:
        model.output_layer.register_forward_hook(lambda _m, _i, output: seen.append(output[0].shape[0]))
    ids = sequences()
    width = -(-max(map(len, ids)) // 8) * 8
    data: Any = BatchedDataDict(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in ids]),
        input_lengths=torch.tensor([len(row) for row in ids]),
        prompt_lengths=torch.tensor([prompt for prompt, _ in LENGTHS]),
    )
    order = list(range(len(ids)))
    if packed:
        packing = {
            "algorithm": "modified_first_fit_decreasing",
            "input_key": "input_ids",
            "input_lengths_key": "input_lengths",
            "sequence_length_pad_multiple": 8,
            "max_tokens_per_microbatch": 40,
        }
        (data,), order = data.shard_by_batch_size(1, batch_size=None, sequence_packing_args=packing)
    cfg = {
        "logprob_batch_size": 2,
        "dynamic_batching": {"enabled": False},
        "sequence_packing": {"enabled": packed},
        "make_sequence_length_divisible_by": 8,
        "megatron_cfg": {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "sequence_parallel": sequence_parallel,
        },
    }
    return model, data, order, cfg, seen


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[tuple[str, str], Any]]]:
    """By cut, what every rank returned. One set of processes for all cuts of one size: starting them is what costs."""
    found = {}
    for world in (1, 2, 4):
        cuts = [cut for cut, (tp, pp, cp, *_) in CUTS.items() if tp * pp * cp == world]
        ranks = run_ranks(score_all, world, cuts)
        found |= dict.fromkeys(cuts, ranks)
    return found


@pytest.mark.parametrize("kind", ["own", "given"])
@pytest.mark.parametrize("cut", CUTS)
def test_scores_equal_one_plain_forward(cut: str, kind: str, results: Any) -> None:
    tp, _, cp, packed, _ = CUTS[cut]
    expected_TV = reference(attention=not packed)
    answers = [rank[cut, kind] for rank in results[cut] if rank[cut, kind][0] is not None]
    assert len(answers) == tp * cp  # all ranks of the last pipeline stage and no other
    for scores, order, _ in answers:
        ids_TK, logprobs_TK = (in_given_order(scores[name], order) for name in ("ids", "logprobs"))
        assert ids_TK.dtype == torch.int32
        torch.testing.assert_close(logprobs_TK, expected_TV.gather(-1, ids_TK.long()), atol=2e-5, rtol=0)
        if kind == "given":
            assert torch.equal(ids_TK, torch.cat(candidates()))
        else:
            torch.testing.assert_close(logprobs_TK, expected_TV.topk(K).values, atol=2e-5, rtol=0)


@pytest.mark.parametrize("cut", CUTS)
def test_only_response_rows_reach_the_output_layer(cut: str, results: Any) -> None:
    tp = CUTS[cut][0]
    per_rank = [rank[cut, "own"][2] for rank in results[cut] if rank[cut, "own"][0] is not None]
    assert sum(per_rank) == tp * sum(size for _, size in LENGTHS)


def in_given_order(part_TK: Tensor, order: list[int]) -> Tensor:
    """Rows of sequences that were scored in `order`, as the batch had them."""
    parts = part_TK.split([LENGTHS[i][1] for i in order])
    return torch.cat([parts[order.index(i)] for i in range(len(order))])
