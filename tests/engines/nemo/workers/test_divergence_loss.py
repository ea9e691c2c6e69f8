"""The divergence as NeMo-RL v0.7.0 calls it, with data of the real shapes. Over ranks: losses/test_parallel.py."""

import enum
import pickle
import sys
from collections import UserDict
from types import ModuleType

import pytest
import torch

from mopd_nemo.engines.nemo.workers.divergence_loss import DivergenceLoss, Groups
from mopd_nemo.losses.objectives import Divergence, SampledReverseKL
from mopd_nemo.losses.reference import token_divergence

B, S, V, H = 4, 10, 30, 6
PROMPTS, LENGTHS = [3, 1, 5, 2], [10, 7, 8, 2]


def no_groups() -> Groups:
    return Groups()


def teacher_weight() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def batch() -> UserDict:
    """A micro-batch as NeMo-RL makes it: right-padded ids, masks, extras by position; the last sample is masked out."""
    generator = torch.Generator().manual_seed(0)
    token_mask = torch.zeros(B, S)
    for i, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        token_mask[i, prompt:length] = 1
    hidden = torch.randn(B, S, H, generator=generator)
    values, indices = (hidden @ teacher_weight().T).log_softmax(-1).topk(5)
    return UserDict(
        input_ids=torch.randint(0, V, (B, S), generator=generator),
        input_lengths=torch.tensor(LENGTHS),
        token_mask=token_mask,
        sample_mask=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        advantages=torch.randn(B, 1, generator=generator).expand(B, S),
        prev_logprobs=torch.randn(B, S, generator=generator) - 3,
        generation_logprobs=torch.randn(B, S, generator=generator) - 3,
        reference_policy_logprobs=torch.randn(B, S, generator=generator) - 3,
        teacher_hidden=hidden,
        teacher_topk_logits=values,
        teacher_topk_indices=indices.to(torch.int32),
    )


def counts(batch: UserDict) -> tuple[torch.Tensor, torch.Tensor]:
    """global_valid_seqs and global_valid_toks as NeMo-RL computes them."""
    mask = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
    return batch["sample_mask"].sum(), mask.sum()


def student_logits() -> torch.Tensor:
    return torch.randn(B, S, V, generator=torch.Generator().manual_seed(3)).requires_grad_()


def valid(batch: UserDict) -> torch.Tensor:
    return (batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]).bool()


@pytest.mark.parametrize("support", ["full", "student_topk", "teacher_topk", "given"])
def test_divergence_on_logits(batch: UserDict, support) -> None:
    objective = Divergence("jsd", 0.3, "teacher_topk" if support == "given" else support, 5)
    teacher_TV = (batch["teacher_hidden"] @ teacher_weight().T)[:, :-1][valid(batch)]
    if support == "given":
        del batch["teacher_hidden"]
    loss_fn = DivergenceLoss(objective, teacher_head=teacher_weight, groups=no_groups, watch=5)
    logits = student_logits()
    loss, metrics = loss_fn(
        data=batch, global_valid_seqs=counts(batch)[0], global_valid_toks=counts(batch)[1], logits=logits
    )
    (grad,) = torch.autograd.grad(loss, logits)
    arguments = {name: getattr(objective, name) for name in objective.__slots__}
    wanted = token_divergence(logits[:, :-1][valid(batch)], teacher_TV, **arguments).mean()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, logits)[0])
    assert metrics["loss"] == pytest.approx(loss.item())
    assert metrics["num_valid_samples"] == 3
    assert 0 < metrics["student/topk_mass"] < 1


def test_signals_on_the_student_s_own_tokens_say_what_the_teacher_gives_them(batch: UserDict) -> None:
    del batch["teacher_hidden"]
    objective = Divergence("jsd", 0.3, "teacher_topk", 5)
    known = [
        DivergenceLoss(objective, teacher_head=teacher_weight, groups=no_groups, watch=5, student_support=student)(
            batch, *counts(batch), logits=student_logits()
        )[1]
        for student in (False, True)
    ]
    assert known[0].keys() - known[1].keys() == {"topk_overlap"}
    expected = batch["teacher_topk_logits"][:, :-1][valid(batch)].exp().sum(-1).mean()
    assert known[1]["teacher/topk_mass"] == pytest.approx(expected.item())


def test_micro_batches_add_up_and_packing_changes_nothing(batch: UserDict) -> None:
    """One call on the batch; a call a sequence, cut to its length, as the packing wrapper makes them."""
    seqs, toks = counts(batch)
    for aggregation in ("token_mean", "sequence_mean"):
        loss_fn = DivergenceLoss(
            Divergence(k=5), aggregation=aggregation, teacher_head=teacher_weight, groups=no_groups, watch=5
        )
        whole, metrics = loss_fn(batch, seqs, toks, logits=student_logits())
        parts = []
        for i, length in enumerate(LENGTHS):
            one = {k: v[i : i + 1, :length] if v.ndim > 1 else v[i : i + 1] for k, v in batch.items()}
            padded = torch.nn.functional.pad(student_logits()[i : i + 1, :length], (0, 0, 0, 3), value=9.0)
            parts.append(loss_fn(one, seqs, toks, logits=padded))
        torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
        for name, value in metrics.items():
            assert sum(part[name] for _, part in parts) == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_a_micro_batch_without_tokens_backpropagates_zero(batch: UserDict) -> None:
    seqs, toks = counts(batch)
    batch["sample_mask"] = torch.zeros(B)
    logits = student_logits()
    loss_fn = DivergenceLoss(Divergence(k=5), teacher_head=teacher_weight, groups=no_groups, watch=5)
    loss, metrics = loss_fn(batch, seqs, toks, logits=logits)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == metrics["loss"] == 0.0
    assert not grad.any()


def test_what_is_missing_is_named(batch: UserDict) -> None:
    with pytest.raises(ValueError, match="made without teacher_head"):
        DivergenceLoss(Divergence(k=5), groups=no_groups)(batch, *counts(batch), logits=student_logits())
    del batch["teacher_hidden"], batch["teacher_topk_indices"]
    with pytest.raises(ValueError, match="neither teacher_hidden nor teacher_topk_indices"):
        DivergenceLoss(Divergence(k=5), groups=no_groups)(batch, *counts(batch), logits=student_logits())


def test_it_travels_and_speaks_nemo_rls_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """NeMo-RL compares its own enum members; the loss imports without it and finds them when asked."""
    interfaces = ModuleType("nemo_rl.algorithms.loss.interfaces")
    vars(interfaces)["LossInputType"] = enum.Enum("LossInputType", ["LOGIT", "LOGPROB", "DISTILLATION"])
    vars(interfaces)["LossType"] = enum.Enum("LossType", ["TOKEN_LEVEL", "SEQUENCE_LEVEL"])
    for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)
    again = pickle.loads(pickle.dumps(DivergenceLoss(SampledReverseKL(), teacher_head=teacher_weight)))
    assert again.input_type is interfaces.LossInputType["LOGIT"]
    assert again.loss_type is interfaces.LossType["TOKEN_LEVEL"]
