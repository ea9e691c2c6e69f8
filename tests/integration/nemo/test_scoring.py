"""The teacher's forward on real Megatron-Core, against one Hugging Face forward of the same checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

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


GROUPS = ((12, (9, 4, 1, 6, 0)), (5, (3,)), (30, (8, 5, 7)), (3, (0,)), (7, (0, 2)))
"""(prompt tokens, response tokens of each row)."""
BUDGETS = {"one packed row": 200, "several": 48, "shorter than a row": 20}
SHARING = {"one rank": (1, 1), "tp2, sequence parallel": (2, 1), "pp2": (1, 2), "tp2, pp2": (2, 2)}
"""tp, pp."""


def shared_pairs() -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of all rows, those of a group apart from each other."""
    generator = torch.Generator().manual_seed(1)

    def draw(size: int) -> list[int]:
        return torch.randint(3, VOCAB, (size,), generator=generator).tolist()

    groups = [(draw(prompt), [draw(size) for size in responses]) for prompt, responses in GROUPS]
    most = max(len(responses) for _, responses in groups)
    return [(prompt, responses[n]) for n in range(most) for prompt, responses in groups if n < len(responses)]


def score_shared(cuts: list[str]) -> dict[tuple[str, str, str], Any]:
    """By cut, budget and kind of scores: with prompts shared, and row by row as NeMo-RL packs and batches them."""
    from mopd_nemo.engines.nemo.workers import megatron

    results: dict[tuple[str, str, str], Any] = {}
    for name in cuts:
        tp, pp = SHARING[name]
        worker = started(tp, pp, 1, True, tp > 1)
        worker.prepare_for_lp_inference()
        for budget, tokens in BUDGETS.items():
            worker.cfg["sequence_packing"]["logprob_mb_tokens"] = tokens
            for kind in ("own", "given"):
                results[name, budget, kind] = read(worker, kind)
        for kind in ("own", "given"):
            with mock.patch.object(megatron, "row_by_row", lambda _: "to compare"):
                results[name, "row by row", kind] = read(worker, kind)
    return results


def read(worker: Any, kind: str) -> Any:
    """Scores of `shared_pairs` in their order."""
    pairs = shared_pairs()
    spread_K = torch.arange(0, 400, 50)
    given = [(torch.arange(n, n + len(response))[:, None] + spread_K).int() for n, (_, response) in enumerate(pairs)]
    batch = score_batch(
        pairs,
        given if kind == "given" else None,
        pad_id=0,
        length_multiple=worker.cfg["make_sequence_length_divisible_by"],
    )
    data, order = dealt(worker, batch, 64)
    scores = worker.score_responses(data=data, k=K, vocab_size=VOCAB, self_teacher=False, dtype="float32")
    if scores is None:
        return None
    sizes = [len(pairs[i][1]) for i in order]
    parts = {name: torch.as_tensor(scores[name]).split(sizes) for name in ("ids", "logprobs")}
    given_order = sorted(range(len(order)), key=order.__getitem__)
    joined = {name: torch.cat([part[i] for i in given_order]) for name, part in parts.items()}
    return joined | {"counts": scores["counts"].tolist()}


@pytest.fixture(scope="module")
def shared() -> dict[str, list[dict[tuple[str, str, str], Any]]]:
    """By cut, what every rank returned."""
    found = {}
    for world in (1, 2, 4):
        cuts = [cut for cut, (tp, pp) in SHARING.items() if tp * pp == world]
        ranks = run_ranks(score_shared, world, cuts)
        found |= dict.fromkeys(cuts, ranks)
    return found


@pytest.mark.parametrize("kind", ["own", "given"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("cut", SHARING)
def test_a_prompt_read_once_gives_the_scores_of_rows_read_one_by_one(
    cut: str, budget: str, kind: str, shared: Any
) -> None:
    answers = [rank for rank in shared[cut] if rank[cut, budget, kind] is not None]
    assert len(answers) == SHARING[cut][0]
    for rank in answers:
        once, alone = rank[cut, budget, kind], rank[cut, "row by row", kind]
        assert torch.equal(once["ids"], alone["ids"])
        torch.testing.assert_close(once["logprobs"], alone["logprobs"], atol=1e-5, rtol=0)
        assert len(once["ids"]) == sum(len(response) for _, response in shared_pairs())


@pytest.mark.parametrize("cut", ["one rank", "tp2, sequence parallel"])
def test_a_prompt_is_read_once_in_a_packed_row(cut: str, shared: Any) -> None:
    alone = sum(len(prompt) + len(response) for prompt, response in shared_pairs())
    once = sum(prompt + sum(responses) for prompt, responses in GROUPS)
    (first, *_) = (rank for rank in shared[cut])
    counts = {budget: first[cut, budget, "own"]["counts"] for budget in BUDGETS}
    positions, padding = counts["one packed row"]
    assert positions - padding == once < alone / 1.8 and padding < 4
    read = {budget: positions - padding for budget, (positions, padding) in counts.items()}
    assert once < read["several"] < read["shorter than a row"] <= alone
    positions, padding = first[cut, "row by row", "own"]["counts"]
    assert positions - padding == alone


def test_a_stage_reads_packed_rows_of_one_length(shared: Any) -> None:
    (last,) = (rank for rank in shared["pp2"] if rank["pp2", "several", "own"] is not None)
    alone = last["pp2", "row by row", "own"]["counts"]
    positions, padding = last["pp2", "several", "own"]["counts"]
    assert positions < alone[0] and 0 < padding < positions / 4


def moved(row: Any) -> Any:
    """Positions of all tokens but the first prompt's are one on."""
    after = torch.arange(len(row.ids_S)) >= GROUPS[0][0]
    return dataclasses.replace(row, positions_S=row.positions_S + after)


def blind(row: Any) -> Any:
    """Keys of prompts are those one before."""
    own = row.keys_C.diff(prepend=row.keys_C[:1] - 1) == 1
    return dataclasses.replace(row, keys_C=torch.where(own, row.keys_C, (row.keys_C - 1).clamp(min=0)))


def late(row: Any) -> Any:
    """Responses are predicted one token late."""
    rows = dataclasses.replace(row.responses, position_R=(row.responses.position_R + 1).clamp(max=len(row.ids_S) - 1))
    return dataclasses.replace(row, responses=rows)


def differences() -> dict[str, float]:
    """Of scores by faulty packed rows, or a mask aligned with the first keys, from true ones."""
    from mopd_nemo.engines.nemo.workers import megatron, shared_prompt

    worker = started(1, 1, 1, True, False)
    worker.prepare_for_lp_inference()
    worker.cfg["sequence_packing"]["logprob_mb_tokens"] = 200
    true = read(worker, "given")["logprobs"]
    found = {}
    faults: tuple[Callable[[Any], Any], ...] = (moved, blind, late)
    for fault in faults:
        faulty = mock.patch.object(megatron, "shared_row", lambda *a, fault=fault: fault(shared_prompt.shared_row(*a)))
        with faulty:
            found[fault.__name__] = float((read(worker, "given")["logprobs"] - true).abs().max())
    top_left = SimpleNamespace(padding_causal_bottom_right=SimpleNamespace(name="padding_causal"))
    with mock.patch.object(shared_prompt, "Mask", top_left):
        found["top left"] = float((read(worker, "given")["logprobs"] - true).abs().max())
    return found


def test_what_is_one_token_off_would_be_seen() -> None:
    (found,) = run_ranks(differences, 1)
    assert found.keys() == {"moved", "blind", "late", "top left"} and min(found.values()) > 0.1, found
