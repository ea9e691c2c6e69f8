"""Who is asked what: the targets of a contrast. Scores by real workers: tests/integration/nemo/test_engine.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mopd_nemo.config.load import config_from
from mopd_nemo.engines.base import TokenCounts
from mopd_nemo.engines.nemo.scorer import Scorer
from mopd_nemo.losses.logits import TopK
from mopd_nemo.losses.objectives import Divergence, Dpo, Objective, SampledReverseKL
from mopd_nemo.losses.reference import contrasted
from mopd_nemo.types import TrainExample

VOCABULARY, K = 30, 4
ROWS = [
    TrainExample(0, 0, (1,), (2, 3), (), (7, 1), contrast_prompt_ids=(8, 1)),
    TrainExample(0, 1, (1,), (4,), (), (7, 1)),
    TrainExample(1, 0, (5,), (6, 2, 2), (), (7, 5), contrast_prompt_ids=(8, 5)),
]


class Policy:
    """A model that answers by its prompt and the response so far, with `Scorer._scores` on it."""

    data_parallel_size = 1

    def prepare_for_lp_inference(self) -> None:
        pass

    def logprobs_TV(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        seed = torch.Generator().manual_seed(sum(31 * i + token for i, token in enumerate(prompt)))
        return torch.randn(len(response), VOCABULARY, generator=seed).log_softmax(-1)


def scores(
    self: Any, policy: Policy, sequences: Any, candidates: Sequence[Tensor] | None, k: int, *_: Any, **__: Any
) -> tuple[list[TopK], TokenCounts]:
    found = []
    for number, (prompt, response) in enumerate(sequences):
        logprobs_TV = policy.logprobs_TV(prompt, response)
        ids_TK = logprobs_TV.topk(k).indices if candidates is None else candidates[number].long()
        found.append(TopK(ids_TK, logprobs_TV.gather(-1, ids_TK).half()))
    tokens = sum(len(prompt) + len(response) for prompt, response in sequences)
    return found, TokenCounts(tokens, 0)


@pytest.mark.parametrize("support", ["student_topk", "teacher_topk"])
@pytest.mark.parametrize("tail", [True, False])
def test_a_contrast_is_made_of_two_passes_over_one_support(
    monkeypatch: pytest.MonkeyPatch, support: Any, tail: bool
) -> None:
    monkeypatch.setattr(Scorer, "_scores", scores)
    policy = Policy()
    scorer = Scorer(policy, None, config_from({"engine": "nemo"}, "test"), 0, VOCABULARY)
    plain, read = scorer.teach(ROWS, Divergence(support=support, k=K, tail=tail))
    found, twice = scorer.teach(ROWS, Divergence(support=support, k=K, tail=tail, contrast=0.5))
    assert read == {"score/tokens": 12, "score/tokens_alone": 12, "score/padding": 0.0}
    assert twice == {"score/tokens": 12 + 9, "score/tokens_alone": 12 + 9, "score/padding": 0.0}
    assert torch.equal(found[1].logprobs_TK, plain[1].logprobs_TK), "without failures"
    for number in (0, 2):
        row, ids_TK = ROWS[number], plain[number].ids_TK
        assert torch.equal(found[number].ids_TK, ids_TK) and found[number].logprobs_TK.dtype == torch.half
        failure_TK = policy.logprobs_TV(row.contrast_prompt_ids or (), row.response_ids).gather(-1, ids_TK)
        wanted = contrasted(plain[number].logprobs_TK.float(), failure_TK, 0.5, tail)
        torch.testing.assert_close(found[number].logprobs_TK.float(), wanted, atol=5e-3, rtol=0)


def scorer_of(teacher: Any, updates: int = 1, backend: str = "megatron") -> Scorer:
    settings: dict[str, Any] = {"engine": "nemo", "train": {"num_updates_per_step": updates}}
    if teacher is not None:
        settings["teacher"] = {"kind": "external", "path": "some/teacher"}
    if backend == "dtensor":
        settings |= {"nemo": {"backend": "dtensor", "batching": "dynamic"}, "data": {"max_prompt_tokens": 64}}
    return Scorer(Asked(), teacher, config_from(settings, "test"), 0, VOCABULARY)


@pytest.mark.parametrize(
    ("objective", "apart", "updates", "backend", "stays"),
    [
        (Divergence(support="full"), False, 1, "megatron", True),
        (Divergence(support="full"), True, 2, "megatron", True),
        (Divergence(support="student_topk"), True, 1, "megatron", True),
        (Divergence(support="student_topk"), True, 2, "megatron", False),
        (Divergence(support="student_topk"), False, 2, "megatron", True),
        (Divergence(support="teacher_topk"), True, 2, "megatron", True),
        (Divergence(support="student_topk"), False, 1, "dtensor", True),
        (Divergence(support="teacher_topk"), True, 1, "dtensor", False),
        (SampledReverseKL(), True, 1, "megatron", True),
        (Dpo(0.1), False, 1, "megatron", False),
        (Dpo(0.1), True, 1, "megatron", False),
    ],
)
def test_which_targets_stay_in_workers(
    objective: Objective, apart: bool, updates: int, backend: str, stays: bool
) -> None:
    assert scorer_of(Asked() if apart else None, updates, backend).stays(objective) == stays


class Asked:
    """A policy that remembers what its workers were asked for, and has handed over one reference to each rank."""

    def __init__(self, ranks: int = 1) -> None:
        self.data_parallel_size = ranks
        self.worker_group = self
        self.calls: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)

    def run_all_workers_single_data(self, method: str, **own: Any) -> list[Any]:
        self.calls.append((method, own))
        rows = {"rows": [(rank, f"rows of {rank}") for rank in sorted(set(own.get("rank_of", {}).values()))]}
        heads = [rows | {"head": [(1, "second shard")]}, {"rows": [], "head": [(0, "first shard")]}]
        return heads if method == "hand_over" else [True]

    def run_all_workers_sharded_data(self, method: str, **own: Any) -> None:
        self.calls.append((method, own))

    def get_all_worker_results(self, _: Any) -> list[Any]:
        return []


def test_an_external_teachers_answers_go_to_the_ranks_of_the_update_by_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dealt: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        Scorer,
        "_shards",
        lambda _, policy, sequences, candidates, ranks, keys: dealt.append((policy, keys)) or ([], []),
    )
    teacher = Asked(ranks=4)
    scorer = scorer_of(teacher)
    student: Any = scorer._student
    student.data_parallel_size = 2
    scorer.keep(ROWS, Divergence(support="full"), [1, 0, 1], [7, 8, 9])
    assert dealt == [(teacher, [7, 8, 9])]
    assert [call if isinstance(call, str) else call[0] for call in teacher.calls] == [
        "prepare_for_lp_inference",
        "keep_targets",
        "offload_after_refit",
        "hand_over",
    ]
    assert teacher.calls[-1][1] == {"rank_of": {7: 1, 8: 0, 9: 1}, "head": True}
    assert [call if isinstance(call, str) else call[0] for call in student.calls] == [
        "forget_targets",
        "offload_after_refit",
        "take_over",
    ]
    taken = student.calls[-1][1]
    assert taken["parts"] == [["rows of 0"], ["rows of 1"]]
    assert taken["common_kwargs"] == {"heads": ["first shard", "second shard"]}
