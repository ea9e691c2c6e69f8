"""Rows to NeMo-RL batches and back."""

import pickle

import numpy as np
import torch

from mopd_nemo.engines.nemo.batches import joined, score_batch, split_scores, train_batch
from mopd_nemo.losses.logits import TopK
from mopd_nemo.types import TrainExample

ROWS = [
    TrainExample(0, 0, (1, 2, 3), (4, 5), (-1.0, -2.0), (9, 1, 2, 3), advantage=0.5),
    TrainExample(0, 1, (1, 2, 3), (6,), (-3.0,), None),
    TrainExample(1, 0, (7,), (8, 9, 9), (-1.0, -1.0, -1.0), (9, 7)),
]


def test_score_batch_pads_and_fills_up() -> None:
    sequences = [(row.teacher_prompt_ids or row.prompt_ids, row.response_ids) for row in ROWS]
    given = [torch.tensor([[3, 1]] * len(row.response_ids)) for row in ROWS]
    batch = score_batch(sequences, given, pad_id=0, length_multiple=4, filler=1)
    assert batch["input_ids"].tolist()[0] == [9, 1, 2, 3, 4, 5, 0, 0]
    assert batch["input_lengths"].tolist() == [6, 4, 5, 2]
    assert batch["prompt_lengths"].tolist() == [4, 3, 2, 1]
    assert [part.shape for part in batch["candidates"]] == [(2, 2), (1, 2), (3, 2), (1, 2)]
    assert all(part.dtype == np.int32 for part in batch["candidates"])
    assert "candidates" not in score_batch(sequences, None, pad_id=0, length_multiple=4, filler=1)


def test_train_batch_carries_what_belongs_to_response_tokens() -> None:
    targets = [TopK(torch.ones(2, 3).int(), torch.full((2, 3), -1.5)), None, None]
    weights = [torch.ones(1, len(row.response_ids)) for row in ROWS]
    batch = train_batch(ROWS, weights, targets, None, pad_id=0, length_multiple=8, filler=1)
    assert batch["input_ids"].shape == (4, 8)
    assert batch["token_mask"].sum(-1).tolist() == [2, 1, 3, 1]
    assert batch["token_mask"][0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert batch["sample_mask"].tolist() == [1, 1, 1, 0]
    assert batch["advantages"].tolist() == [0.5, 0, 0, 0]
    assert [part.shape for part in batch["teacher_ids"]] == [(2, 3), (1, 3), (3, 3), (1, 3)]
    assert all(np.isfinite(part).all() for part in batch["teacher_logprobs"])
    assert batch["weights"][-1].tolist() == [[0.0]]
    assert [part.tolist() for part in batch["sampler"]] == [[-1, -2], [-3], [-1, -1, -1], [0]]


def test_sampler_logprobs_are_all_there_or_left_out() -> None:
    unknown = [TrainExample(0, 0, (1,), (2,), ()), ROWS[0]]
    weights = [torch.ones(1, 1), torch.ones(1, 2)]
    batch = train_batch(unknown, weights, [None, None], None, pad_id=0, length_multiple=1)
    assert "sampler" not in batch and "teacher_ids" not in batch and "old" not in batch


def test_scores_come_back_in_the_rows_order() -> None:
    """Two ranks scored rows 2, filler, and 0, 1; filler has one token."""
    sizes = [2, 1, 3]
    token = {0: [0, 1], 1: [10], 2: [20, 21, 22], 3: [30]}
    ranks = [[2, 3], [0, 1]]
    scores = []
    for numbers in ranks:
        ids = torch.tensor([value for number in numbers for value in token[number]])[:, None].int()
        scores.append({"ids": ids.numpy(), "logprobs": -ids.float().numpy()})
    found = split_scores(scores, [number for numbers in ranks for number in numbers], sizes)
    assert [target.ids_TK.squeeze(-1).tolist() for target in found] == [[0, 1], [10], [20, 21, 22]]
    assert torch.equal(found[2].logprobs_TK.squeeze(-1), torch.tensor([-20.0, -21.0, -22.0]))


def test_a_row_travels_without_the_rows_that_were_scored_with_it() -> None:
    """Candidates and targets that are views of all that a rank has scored, as are weights of one stacked tensor."""
    count, size, width = 64, 16, 8
    rows = [TrainExample(0, n, (1,), tuple(range(size)), tuple([-1.0] * size), advantage=0.0) for n in range(count)]
    ids = np.arange(count * size * width, dtype=np.int32).reshape(-1, width)
    targets = split_scores([{"ids": ids, "logprobs": -ids.astype(np.float32)}], range(count), [size] * count)
    assert all(len(pickle.dumps(target)) < 2 * (2 * 4 * size * width) for target in targets)
    shared = torch.from_numpy(ids).split(size)
    weights = list(torch.ones(count, 1, size))
    old = list(torch.ones(count, size))
    sequences = [(row.prompt_ids, row.response_ids) for row in rows]
    sent = score_batch(sequences, shared, pad_id=0, length_multiple=1)
    batch = train_batch(rows, weights, targets, old, pad_id=0, length_multiple=1)
    for key in ("weights", "sampler", "old", "teacher_ids", "teacher_logprobs"):
        sent[key] = batch[key]
    for key in ("candidates", "weights", "sampler", "old", "teacher_ids", "teacher_logprobs"):
        row = sent[key][1]
        assert len(pickle.dumps(row)) < row.nbytes + 200, key


def test_joined_rows_are_one_tensor_of_their_own() -> None:
    parts = [np.ones((2, 3), np.float16), np.zeros((1, 3), np.float16)]
    for part in parts:
        part.setflags(write=False)  # as Ray gives them
    whole = joined(parts)
    assert whole.dtype == torch.float16 and whole.shape == (3, 3)
    whole += 1
    assert joined([np.ones((2, 1)), np.zeros((2, 2))], axis=-1).shape == (2, 3)
