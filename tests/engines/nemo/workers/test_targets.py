"""What a worker keeps between scoring and update. With real workers: tests/integration/nemo/test_targets.py."""

from __future__ import annotations

import pickle

import pytest
import torch

from mopd_nemo.engines.nemo.batches import NO_ROW
from mopd_nemo.engines.nemo.workers.targets import KeptTargets, as_array
from mopd_nemo.losses.reference import contrasted


def test_rows_come_back_by_their_keys_in_the_order_of_the_update() -> None:
    kept = KeptTargets()
    ids_TK, logprobs_TK = torch.arange(12).view(6, 2).int(), torch.randn(6, 2)
    kept.keep([7, NO_ROW, 3], [3, 1, 2], {"ids": ids_TK, "logprobs": logprobs_TK})
    columns = kept.columns([3, NO_ROW, 7], [2, 4, 3])
    assert torch.equal(columns["teacher_ids"][0], ids_TK[4:]) and torch.equal(columns["teacher_ids"][2], ids_TK[:3])
    assert torch.equal(columns["teacher_logprobs"][2], logprobs_TK[:3])
    assert columns["teacher_ids"][1].tolist() == [[0, 1]] * 4 and columns["teacher_logprobs"][1].isfinite().all()
    supports = kept.supports([NO_ROW, 7], [1, 3])
    assert supports is not None and supports[0].tolist() == [[0, 1]] and supports[1].tolist() == ids_TK[:3].tolist()


def test_a_second_prompt_is_the_first_where_there_is_none() -> None:
    kept = KeptTargets()
    hidden_TH, second_RH = torch.randn(5, 3), torch.randn(2, 3)
    kept.keep([0, 1], [3, 2], {"hidden": hidden_TH})
    assert set(kept.columns([0, 1], [3, 2])) == {"teacher_hidden"}
    kept.keep([1, NO_ROW], [2, 1], {"second": torch.cat([second_RH, second_RH[:1]])})
    columns = kept.columns([0, 1, NO_ROW], [3, 2, 1])
    assert torch.equal(columns["teacher_second"][0], hidden_TH[:3])
    assert torch.equal(columns["teacher_second"][1], second_RH)
    assert columns["teacher_hidden"][2].shape == (1, 3)


def test_the_head_is_a_copy() -> None:
    kept, weight_VH = KeptTargets(), torch.ones(4, 3)
    assert kept.head(torch.device("cpu")) is None
    kept.keep_head(weight_VH)
    weight_VH.zero_()
    head_VH = kept.head(torch.device("cpu"))
    assert head_VH is not None and head_VH.sum() == 12


def test_a_contrast_replaces_the_target_in_its_own_type() -> None:
    kept = KeptTargets()
    good_TK, bad_TK = (torch.randn(4, 3).log_softmax(-1).half() for _ in range(2))
    kept.keep([0, 1], [1, 3], {"ids": torch.arange(3).repeat(4, 1), "logprobs": good_TK})
    kept.contrast([1, NO_ROW], [3, 1], torch.cat([bad_TK[1:], bad_TK[:1]]), 0.5, False)
    first_RK, second_RK = kept.columns([0, 1], [1, 3])["teacher_logprobs"]
    assert torch.equal(first_RK, good_TK[:1]) and second_RK.dtype == torch.half
    assert torch.equal(second_RK, contrasted(good_TK[1:].float(), bad_TK[1:].float(), 0.5, False).half())


def test_what_is_handed_over_is_what_was_kept() -> None:
    """Rows go to the ranks that asked for them, in bfloat16 as it is, through what Ray would pickle."""
    kept, hidden_TH = KeptTargets(), torch.randn(6, 3).bfloat16()
    kept.keep([4, 5, 6], [3, 1, 2], {"hidden": hidden_TH})
    kept.keep([5], [1], {"second": hidden_TH[:1]})
    parts = pickle.loads(pickle.dumps(kept.packed({4: 1, 5: 0, 6: 1, 9: 0})))
    assert set(parts) == {0, 1}
    first, second = KeptTargets(), KeptTargets()
    first.take(parts[0])
    second.take(parts[1])
    columns = second.columns([6, 4], [2, 3])
    assert torch.equal(torch.cat(columns["teacher_hidden"]), hidden_TH[[4, 5, 0, 1, 2]])
    columns = first.columns([5], [1])
    assert torch.equal(columns["teacher_hidden"][0], hidden_TH[3:4])
    assert torch.equal(columns["teacher_second"][0], hidden_TH[:1])


@pytest.mark.parametrize("width", [2, 4, 5, 16])
def test_a_head_that_is_cut_another_way_is_the_same(width: int) -> None:
    """12 rows over 3 ranks of the teacher, of which 10 are real; over ranks of the student with its own padding."""
    whole_VH = torch.randn(12, 3).bfloat16()
    shards = [as_array(shard_VH) for shard_VH in whole_VH.split(4)]
    found = []
    for start in range(0, 12, width):
        kept = KeptTargets()
        kept.keep_columns(shards, start, width)
        assert kept.head_VH is not None and kept.head_VH.shape == (width, 3)
        found.append(kept.head_VH)
    assert torch.equal(torch.cat(found)[:12], whole_VH)


def test_a_target_of_another_batch_is_not_taken() -> None:
    with pytest.raises(ValueError, match="row 2 has no target in this worker"):
        KeptTargets().columns([2], [1])
    kept = KeptTargets()
    kept.keep([0], [1], {"hidden": torch.zeros(1, 3)})
    with pytest.raises(ValueError, match="row 5 has no target"):
        kept.columns([0, 5], [1, 1])
    assert kept.columns([NO_ROW], [1]) == {} and KeptTargets().supports([0], [1]) is None
