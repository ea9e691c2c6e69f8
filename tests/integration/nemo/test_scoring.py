"""The teacher's forward on real Megatron-Core, against one Hugging Face forward of the same checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mopd_nemo.engines.nemo.batches import score_batch
from tests.conftest import EMBEDDED
from tests.integration.nemo.ranks import cut, dealt, nemo_config, run_ranks, start

K = 8
VOCAB = 400
"""Real tokens, of the model's 428: the other columns stand for those that Megatron adds to make shards equal."""
LENGTHS = ((5, 4), (9, 7), (3, 1), (12, 9))
"""(prompt, response) tokens of the sequences."""


def sequences() -> list[list[int]]:
    """Sequences of different lengths; the seed makes them the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (sum(pair),), generator=generator).tolist() for pair in LENGTHS]


def reference() -> Tensor:
    """Log-probabilities [T, V] of all response positions, from one plain forward per sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    rows = []
    with torch.no_grad():
        for ids, (prompt, _) in zip(sequences(), LENGTHS, strict=True):
            rows.append(model(torch.tensor([ids])).logits[0, prompt - 1 : -1, :VOCAB].log_softmax(-1))
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
    results: dict[tuple[str, str], Any] = {}
    for name in cuts:
        worker = started(*CUTS[name])
        seen: list[int] = []
        head = getattr(worker.model.module, "output_layer", None)
        if head is not None:
            head.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output[0].shape[0]))
        pairs = [(ids[:prompt], ids[prompt:]) for ids, (prompt, _) in zip(sequences(), LENGTHS, strict=True)]
        for kind, given in (("own", None), ("given", candidates())):
            multiple = worker.cfg["make_sequence_length_divisible_by"]
            batch = score_batch(pairs, given, pad_id=0, length_multiple=multiple)
            data, order = dealt(worker, batch)
            worker.prepare_for_lp_inference()
            scores = worker.score_responses(data=data, k=K, vocab_size=VOCAB, self_teacher=False, dtype="float32")
            results[name, kind] = scores, order, sum(seen)
    return results


def started(tp: int, pp: int, cp: int, packed: bool, sequence_parallel: bool) -> Any:
    """A worker under a cut."""
    return start(nemo_config(nemo=cut(tp * pp * cp, tp, pp, cp, packed, sequence_parallel)))


def candidates() -> list[Tensor]:
    """Tokens to score, different for every response position and sequence."""
    spread_K = torch.arange(0, 400, 50)
    return [(torch.arange(number, number + size)[:, None] + spread_K).int() for number, (_, size) in enumerate(LENGTHS)]


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
    tp, _, cp, _, _ = CUTS[cut]
    expected_TV = reference()
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


def in_given_order(part_TK: Any, order: list[int]) -> Tensor:
    """Rows of sequences that were scored in `order`, as the batch had them."""
    parts = torch.as_tensor(part_TK).split([LENGTHS[i][1] for i in order])
    return torch.cat([parts[order.index(i)] for i in range(len(order))])
