"""The plain reference: its values, its bounds, its gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mopd_nemo.losses.objectives import DivergenceKind, Support, TokenWeights
from mopd_nemo.losses.reference import (
    contrasted,
    divergence_entries,
    divergence_weight,
    sampled_reverse_kl,
    token_divergence,
    token_weight,
)

KINDS = ["forward_kl", "reverse_kl", "jsd"]
SUPPORTS = ["full", "student_topk", "teacher_topk"]
CASES = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from(SUPPORTS),
    st.booleans(),
    st.integers(1, 12),
    st.floats(0.05, 0.95),
    st.floats(0.1, 4.0),
    st.integers(0, 10_000),
)


def logits(seed: int, scale: float = 1.0, rows: int = 4, columns: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64) * scale
    return both[0], both[1]


@settings(max_examples=60)
@given(CASES)
def test_never_negative_and_zero_for_equals(case) -> None:
    kind, support, tail, k, alpha, scale, seed = case
    student, teacher = logits(seed, scale)
    arguments = {"kind": kind, "alpha": alpha, "support": support, "k": k, "tail": tail}
    assert (token_divergence(student, teacher, **arguments) >= -1e-12).all()
    assert token_divergence(student, student + 3.0, **arguments).abs().max() < 1e-12


@settings(max_examples=60)
@given(CASES)
def test_tail_is_at_most_full_and_grows_to_it(case) -> None:
    kind, support, _, k, alpha, scale, seed = case
    student, teacher = logits(seed, scale)
    full = token_divergence(student, teacher, kind=kind, alpha=alpha, support="full")
    support = "student_topk" if support == "full" else support
    values = [
        token_divergence(student, teacher, kind=kind, alpha=alpha, support=support, k=j) for j in sorted({k, 11, 12})
    ]
    for coarse, fine in zip(values, [*values[1:], full], strict=True):
        assert (coarse <= fine + 1e-9).all()
    torch.testing.assert_close(values[-1], full)
    torch.testing.assert_close(values[-2], full)  # all tokens but one: the tail is that token


@pytest.mark.parametrize("kind", KINDS)
def test_values_by_hand(kind: str) -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64), torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)
    m = 0.75 * p + 0.25 * q
    by_hand = {
        "forward_kl": (q * (q / p).log()).sum(),
        "reverse_kl": (p * (p / q).log()).sum(),
        "jsd": 0.75 * (p * (p / m).log()).sum() + 0.25 * (q * (q / m).log()).sum(),
    }[kind]
    loss_T = token_divergence(p.log() + 5, q.log() - 2, kind=kind, alpha=0.25, support="full")
    assert loss_T.item() == pytest.approx(by_hand.item())


def test_topk_keeps_the_tail_or_renormalises() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.1, 0.6, 0.3]])
    tail = token_divergence(p.log(), q.log(), kind="reverse_kl", support="student_topk", k=1)
    assert tail.item() == pytest.approx(0.7 * math.log(7) + 0.3 * math.log(0.3 / 0.9), rel=1e-5)
    teacher = token_divergence(p.log(), q.log(), kind="reverse_kl", support="teacher_topk", k=2, tail=False)
    assert teacher.item() == pytest.approx(2 / 3 * math.log(1) + 1 / 3 * math.log(1), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("tail", [True, False])
def test_gradcheck(kind, support, tail: bool) -> None:
    student, teacher = logits(3, rows=3)
    torch.autograd.gradcheck(
        lambda x: token_divergence(x, teacher, kind=kind, alpha=0.3, support=support, k=5, tail=tail),
        student.requires_grad_(),
    )


def test_teacher_gets_no_gradient() -> None:
    student, teacher = logits(0)
    teacher.requires_grad_()
    assert not token_divergence(student, teacher, kind="jsd").requires_grad


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_sampled_form_has_the_reverse_kls_gradient_in_expectation(seed: int) -> None:
    student, teacher = logits(seed, rows=1, columns=6)
    student.requires_grad_()
    (exact,) = torch.autograd.grad(token_divergence(student, teacher, kind="reverse_kl", support="full").sum(), student)
    expected = torch.zeros_like(exact)
    for token, probability in enumerate(student.detach().softmax(-1)[0]):
        loss_T = sampled_reverse_kl(student, teacher, torch.tensor([token]))
        expected += probability * torch.autograd.grad(loss_T.sum(), student)[0]
    torch.testing.assert_close(expected, exact)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [3, 6, 100])
def test_tokens_that_neither_can_give_change_nothing(
    kind: DivergenceKind, support: Support, tail: bool, k: int
) -> None:
    """Masked columns (padding of the vocabulary, forbidden tokens): value and gradient are those without them."""
    student, teacher = logits(3, columns=8)
    masked = [torch.nn.functional.pad(x, (0, 4), value=-math.inf) for x in (student, teacher)]
    student.requires_grad_()
    masked[0].requires_grad_()
    arguments = {"kind": kind, "support": support, "k": k, "tail": tail}
    expected = token_divergence(student, teacher, **arguments)
    value = token_divergence(masked[0], masked[1], **arguments)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(masked[0].grad[:, :8], student.grad)
    assert (masked[0].grad[:, 8:] == 0).all()


def test_a_contrast_by_hand() -> None:
    """Q_S·(Q_S/Q_F)^β, normalised; the third token is too unlikely after successes to be compared. So is the tail."""
    success = torch.tensor([[0.5, 0.3, 0.02]], dtype=torch.float64)
    failure = torch.tensor([[0.1, 0.6, 0.2]], dtype=torch.float64)
    scores = [0.5 * (0.5 / 0.1) ** 0.5, 0.3 * (0.3 / 0.6) ** 0.5, 0.02, 0.18]
    found = contrasted(success.log(), failure.log(), 0.5, tail=True).exp()
    torch.testing.assert_close(found, torch.tensor([scores[:3]]).double() / sum(scores))
    alone = contrasted(success.log(), failure.log(), 0.5, tail=False).exp()
    torch.testing.assert_close(alone, torch.tensor([scores[:3]]).double() / sum(scores[:3]))


def test_a_contrast_is_bounded_where_failures_hardly_know_a_token() -> None:
    success = torch.tensor([[0.45, 0.45, 0.1]], dtype=torch.float64).log()
    failure = torch.tensor([[1e-30, 0.5, 0.5]], dtype=torch.float64).log()
    found = contrasted(success, failure, 1.0, tail=False).exp()
    assert found[0, 0] / found[0, 1] == pytest.approx(math.exp(3.0) / 0.9)
    assert torch.isfinite(contrasted(success, torch.full_like(failure, -torch.inf), 1.0, tail=False)).all()


@settings(max_examples=40)
@given(st.floats(0.0, 4.0), st.integers(0, 1000), st.booleans())
def test_a_contrast_is_a_distribution_and_none_without_beta_or_difference(beta: float, seed: int, tail: bool) -> None:
    success, failure = (x.log_softmax(-1)[:, :7] for x in logits(seed, 3.0))
    found = contrasted(success, failure, beta, tail)
    mass = found.exp().sum(-1)
    assert ((mass < 1) if tail else (mass - 1).abs() < 1e-12).all()
    for same in (contrasted(success, failure, 0.0, tail), contrasted(success, success, beta, tail)):
        torch.testing.assert_close(same, success if tail else success - success.logsumexp(-1, keepdim=True))


def test_weights_by_hand() -> None:
    """Of two tokens with four outcomes: P is even, then nearly sure; Q the other way round."""
    student, teacher = (torch.tensor(pair, dtype=torch.float64) for pair in ([math.log(4), 0.2], [0.2, math.log(4)]))

    def found(weights: TokenWeights) -> list[float] | None:
        weight = token_weight(weights, student, teacher, 4)
        return None if weight is None else weight.tolist()

    assert found("sharper") == [1.0, 0.0]
    assert found("student_entropy") == pytest.approx([1.0, 0.2 / math.log(4)])
    assert found("teacher_certainty") == pytest.approx([1 - 0.2 / math.log(4), 0.0])
    assert found("none") is None and found("divergence") is None
    assert divergence_weight(torch.tensor([0.0, 0.5, 80.0, -1e-9])).tolist() == pytest.approx(
        [0.0, 1 - math.exp(-0.5), 1.0, 0.0]
    )
    assert token_weight("student_entropy", student[:1] * 0, teacher[:1], 1) == 0.0  # one outcome has no entropy


@settings(max_examples=60)
@given(st.sampled_from(KINDS), st.floats(0.05, 0.95), st.floats(0.1, 4.0), st.integers(0, 1000), st.floats(1e-3, 1.0))
def test_entries_are_never_negative_and_add_up(kind, alpha, scale, seed, clip) -> None:
    student, teacher = (x.log_softmax(-1) for x in logits(seed, scale))
    entries = divergence_entries(student, teacher, kind, alpha)
    whole = token_divergence(student, teacher, kind=kind, alpha=alpha, support="full")
    torch.testing.assert_close(entries.sum(-1), whole)
    assert (entries > -1e-12).all()
    clipped = token_divergence(student, teacher, kind=kind, alpha=alpha, k=99, entry_clip=clip)
    torch.testing.assert_close(clipped, entries.clamp(max=clip).sum(-1))
    assert (clipped > -1e-12).all() and (clipped < whole + 1e-12).all()


def test_a_clipped_token_is_not_pushed_away_from_the_teacher() -> None:
    """The last token is far too unlikely, and its entry alone is clipped. Raw terms would make it unlikelier."""
    p = torch.tensor([[0.25, 0.25, 0.25, 0.2, 0.05]], dtype=torch.float64)
    teacher = torch.tensor([[0.1, 0.1, 0.1, 0.05, 0.65]], dtype=torch.float64).log()
    for kind, clip in (("forward_kl", 0.1), ("reverse_kl", 0.2), ("jsd", 0.1)):
        student = p.log().requires_grad_()
        loss = token_divergence(student, teacher, kind=kind, k=5, entry_clip=clip)  # type: ignore[arg-type]
        loss.sum().backward()
        assert loss > clip and student.grad is not None and student.grad[0, 4] < 0, kind
    raw = p.log().requires_grad_()
    terms = teacher.exp() * (teacher - raw.log_softmax(-1))
    terms.clamp(max=0.1).sum().backward()
    assert terms.clamp(max=0.1).sum() < 0 and raw.grad is not None and raw.grad[0, 4] > 0
