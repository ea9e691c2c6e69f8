"""The production loss against the plain reference, in every form, and what must not change it."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mopd_nemo.losses.logits import Head, Logits, Tokens, TopK
from mopd_nemo.losses.objectives import (
    Divergence,
    LogLikelihood,
    Objective,
    PolicyGradient,
    ReferenceKL,
    SampledReverseKL,
    Suppression,
    token_weights,
)
from mopd_nemo.losses.reference import (
    clipped_policy_gradient,
    dpo_loss,
    importance_weights,
    sampled_reverse_kl,
    token_divergence,
)
from mopd_nemo.losses.token_loss import token_loss
from mopd_nemo.losses.vocab import Vocab

T, H, V = 13, 8, 40
DIVERGENCES = [
    Divergence(kind, 0.3, support, k, tail)  # type: ignore[arg-type]
    for kind in ("forward_kl", "reverse_kl", "jsd")
    for support, k, tail in [
        ("full", 7, True),
        ("student_topk", 7, True),
        ("student_topk", 7, False),
        ("teacher_topk", 7, True),
        ("teacher_topk", 99, True),
    ]
]
SHARPER = [
    Divergence("jsd", 0.3, "student_topk", 30, weights="sharper"),
    Divergence("forward_kl", 0.3, "teacher_topk", 7, tail=False, weights="sharper"),
    Divergence("reverse_kl", support="full", weights="sharper"),
]
CONTRASTS = [
    Divergence("jsd", 0.3, "student_topk", 7, contrast=0.5),
    Divergence("reverse_kl", 0.3, "teacher_topk", 7, tail=False, contrast=2.0),
    Divergence("forward_kl", 0.3, "teacher_topk", 99, contrast=1.0),
    Divergence("jsd", 0.5, "student_topk", 7, weights="sharper", contrast=1.0),
]
WEIGHTED = [
    *(
        Divergence(kind, 0.3, support, 7, tail, weights=weights)  # type: ignore[arg-type]
        for weights in ("student_entropy", "teacher_certainty", "divergence")
        for kind, support, tail in [("jsd", "full", True), ("reverse_kl", "student_topk", True)]
    ),
    Divergence("forward_kl", 0.3, "teacher_topk", 7, tail=False, weights="student_entropy"),
    Divergence("jsd", 0.3, "student_topk", 7, weights="divergence", contrast=0.5),
    Divergence("forward_kl", support="teacher_topk", k=7, weights="divergence", entry_clip=0.2),
]
CLIPPED = [
    *(
        Divergence(kind, 0.3, "student_topk", k, tail, entry_clip=0.05)  # type: ignore[arg-type]
        for kind in ("forward_kl", "reverse_kl", "jsd")
        for k, tail in [(7, True), (7, False), (99, True)]
    ),
]
DIVERGENCES += [*SHARPER, *CONTRASTS, *WEIGHTED, *CLIPPED]
DIVERGENCES += [ReferenceKL(k=7)]
OTHERS = [SampledReverseKL(), PolicyGradient(), LogLikelihood(), Suppression(0.02)]
FORMS = ["fused", "recomputed", "logits", "rows of logits"]


@dataclass
class Case:
    """A student and a teacher as hidden states, head and bias, and sampled tokens."""

    student: tuple[Tensor, Tensor, Tensor]
    teacher: tuple[Tensor, Tensor, Tensor]
    tokens: Tokens
    weights_T: Tensor
    failures: tuple[Tensor, Tensor, Tensor]
    """The teacher after failures alone."""

    @staticmethod
    def make(seed: int = 0, rows: int = T, dtype: torch.dtype = torch.float64) -> "Case":
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        student, teacher = ((normal(rows, H), normal(V, H) / H**0.5, normal(V)) for _ in range(2))
        ids_T = torch.randint(0, V, (rows,), generator=generator)
        logprobs_T = (normal(rows) - 4).to(torch.float64)
        tokens = Tokens(ids_T, normal(rows).double(), logprobs_T, logprobs_T - 0.3)
        weights_T = torch.rand(rows, generator=generator, dtype=torch.float64).to(dtype)
        return Case(student, teacher, tokens, weights_T, (normal(rows, H), *teacher[1:]))

    def teacher_logits(self) -> Tensor:
        hidden, weight, bias = self.teacher
        return hidden @ weight.T + bias

    def contrast(self, objective: Objective) -> dict[str, Head]:
        """What an objective that reads a contrast is given, too."""
        return {"contrast": Head(*self.failures)} if objective.reads_contrast else {}


def reference(objective: Objective, logits: Tensor, case: Case) -> Tensor:
    """loss_T from whole logits, through the plain formulas and autograd."""
    if isinstance(objective, Divergence):
        arguments = {name: getattr(objective, name) for name in Divergence.__slots__}
        hidden, weight, bias = case.failures
        return token_divergence(logits, case.teacher_logits(), contrast_logits_TV=hidden @ weight.T + bias, **arguments)
    ids_T = case.tokens.ids_T
    if isinstance(objective, SampledReverseKL):
        return sampled_reverse_kl(logits, case.teacher_logits(), ids_T)
    logprobs_T = logits.log_softmax(-1).gather(-1, ids_T[:, None]).squeeze(-1)
    if isinstance(objective, PolicyGradient):
        return clipped_policy_gradient(logprobs_T, case.tokens.old_logprobs_T, case.tokens.advantages_T, 0.2, 0.28)
    if isinstance(objective, Suppression):
        return logprobs_T.where(logprobs_T.exp() < objective.below, 0.0)
    return -logprobs_T


def produced(
    objective: Objective, case: Case, form: str, *, chunk_size: int | None = None, **arguments
) -> tuple[Tensor, list[Tensor]]:
    """loss_T and the gradients of Σ weights·loss at hidden states, weight and bias."""
    leaves = [x.clone().requires_grad_() for x in case.student]
    hidden, weight, bias = leaves
    source = Head(hidden, weight, bias)
    if form == "logits":
        source = Logits(hidden @ weight.T + bias)
    elif form == "rows of logits":
        logits = hidden @ weight.T + bias
        source = Logits(torch.cat([logits.new_ones(3, V), logits.flip(0)]), torch.arange(len(hidden) + 2, 2, -1))
    weights_T = None if form == "recomputed" else case.weights_T
    arguments |= case.contrast(objective)
    result = token_loss(
        objective, source, case.tokens, Head(*case.teacher), weights_T=weights_T, chunk_size=chunk_size, **arguments
    )
    total = (result.loss_T * case.weights_T).sum() if form == "recomputed" else result.total
    torch.testing.assert_close(total, (result.loss_T * case.weights_T).sum())
    total.backward()
    return result.loss_T.detach(), [x.grad for x in leaves]


def expected(objective: Objective, case: Case) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in case.student]
    loss_T = reference(objective, leaves[0] @ leaves[1].T + leaves[2], case)
    return loss_T.detach(), list(torch.autograd.grad((loss_T * case.weights_T).sum(), leaves))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", [*DIVERGENCES, *OTHERS], ids=str)
def test_equals_the_reference(objective: Objective, form: str) -> None:
    case = Case.make()
    torch.testing.assert_close(produced(objective, case, form), expected(objective, case))


@settings(max_examples=40)
@given(
    st.sampled_from([*DIVERGENCES, *OTHERS]),
    st.sampled_from(FORMS),
    st.integers(1, 15),
    st.integers(0, 99),
    st.integers(1, 20),
)
def test_chunks_change_nothing(objective: Objective, form: str, chunk_size: int, seed: int, rows: int) -> None:
    case = Case.make(seed, rows)
    torch.testing.assert_close(
        produced(objective, case, form, chunk_size=chunk_size), produced(objective, case, form, chunk_size=rows)
    )


@pytest.mark.parametrize(
    "objective", [o for o in [*DIVERGENCES, *OTHERS[:1], *OTHERS[3:]] if o not in WEIGHTED], ids=str
)
def test_gradcheck(objective: Objective) -> None:
    """Of the per-token form. The score-function form is no function whose finite differences are its gradient, and a
    weight that has no gradient makes none of a divergence; `test_a_weight_scales_loss_and_gradient` has those.
    """
    case = Case.make(rows=3)
    if isinstance(objective, SampledReverseKL):
        objective = LogLikelihood()

    def loss_T(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        student, teacher = Head(hidden, weight, bias), Head(*case.teacher)
        return token_loss(objective, student, case.tokens, teacher, **case.contrast(objective), chunk_size=2).loss_T

    assert torch.autograd.gradcheck(loss_T, [x.clone().requires_grad_() for x in case.student])


@settings(max_examples=25)
@given(
    st.integers(0, 1000),
    st.permutations(range(T)),
    st.integers(1, T - 1),
    st.sampled_from(["token_mean", "sequence_mean"]),
    st.sampled_from([Divergence(), SHARPER[0], CONTRASTS[0]]),
)
def test_micro_batches_and_order_change_nothing(
    seed: int, order: list[int], cut: int, aggregation, objective: Divergence
) -> None:
    """Tokens of four responses, in any order and cut in two anywhere, with the weights of the whole step."""
    case = Case.make(seed)
    lengths = [5, 1, 4, 3]
    per_response = token_weights(lengths, aggregation)
    case.weights_T = torch.tensor([w for w, n in zip(per_response, lengths, strict=True) for _ in range(n)]).double()
    whole_T, whole = produced(objective, case, "fused")
    total, grads = 0.0, [torch.zeros_like(x) for x in whole]
    for part in (torch.tensor(order[:cut]), torch.tensor(order[cut:])):
        hidden, weight, bias = (case.student[0][part], *case.student[1:])
        ids_T = case.tokens.ids_T[part]
        teacher, failures = ((own[0][part], *own[1:]) for own in (case.teacher, case.failures))
        batch = Case((hidden, weight, bias), teacher, Tokens(ids_T), case.weights_T[part], failures)
        loss_T, found = produced(objective, batch, "fused")
        total += (loss_T * batch.weights_T).sum()
        grads[0][part] += found[0]
        grads[1] += found[1]
        grads[2] += found[2]
    torch.testing.assert_close(total, (whole_T * case.weights_T).sum())
    torch.testing.assert_close(grads, whole)


@pytest.mark.parametrize("objective", [Divergence(support="full"), Divergence(k=7), SampledReverseKL()], ids=str)
def test_a_shift_by_one_position_shows(objective: Objective) -> None:
    """With student and teacher equal the loss is 0; with the teacher one row off it is not."""
    case = Case.make()
    hidden, weight, bias = case.student
    aligned = token_loss(objective, Head(hidden, weight, bias), case.tokens, Head(hidden, weight, bias)).loss_T
    shifted = token_loss(
        objective, Head(hidden, weight, bias), case.tokens, Head(hidden.roll(1, 0), weight, bias)
    ).loss_T
    assert aligned.abs().max() < 1e-12
    assert shifted.abs().min() > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_no_token_backpropagates_zero(form: str) -> None:
    case = Case.make(rows=0)
    for objective in (Divergence(k=7), Divergence(support="full"), LogLikelihood()):
        loss_T, grads = produced(objective, case, form, watch=5)
        assert loss_T.shape == (0,)
        empty = token_loss(objective, Head(*case.student), case.tokens, Head(*case.teacher), watch=5).signals
        some = Case.make(rows=2)
        assert list(empty) == list(
            token_loss(objective, Head(*some.student), some.tokens, Head(*some.teacher), watch=5).signals
        )
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_teacher_given_as_topk(kind) -> None:
    case = Case.make()
    logprobs_TV = case.teacher_logits().log_softmax(-1)
    objective = Divergence(kind, 0.3, "teacher_topk", 7)
    values_TK, ids_TK = logprobs_TV.topk(7, dim=-1)
    student = Head(*(x.clone().requires_grad_() for x in case.student))
    result = token_loss(objective, student, case.tokens, TopK(ids_TK, values_TK), weights_T=case.weights_T, watch=7)
    result.total.backward()
    loss_T, grads = expected(objective, case)
    torch.testing.assert_close(result.loss_T, loss_T)
    torch.testing.assert_close(student.weight_VH.grad, grads[1])
    assert set(result.signals) == {
        "student/entropy",
        "student/topk_mass",
        "topk_overlap",
        "sampler/gap",
        "sampler/ratio",
    }


@pytest.mark.parametrize("form", FORMS)
def test_importance_weights_multiply_loss_and_gradient(form: str) -> None:
    case = Case.make()
    plain_T, _ = produced(Divergence(k=7), case, form)
    logits = case.student[0] @ case.student[1].T + case.student[2]
    logprobs_T = logits.log_softmax(-1).gather(-1, case.tokens.ids_T[:, None]).squeeze(-1)
    factor_T = importance_weights(logprobs_T, case.tokens.sampler_logprobs_T, 2.0)
    assert (factor_T == 2.0).any()
    assert (factor_T < 2.0).any()
    loss_T, grads = produced(Divergence(k=7), case, form, importance_clip=2.0)
    torch.testing.assert_close(loss_T, plain_T * factor_T)
    case.weights_T = case.weights_T * factor_T
    torch.testing.assert_close(grads, expected(Divergence(k=7), case)[1])


def test_padding_columns_do_not_exist() -> None:
    case = Case.make()
    hidden = case.student[0]
    padded = [Head(h, torch.cat([w, w[:9]]), torch.cat([b, b[:9] + 50])) for h, w, b in (case.student, case.teacher)]
    student = Head(hidden, padded[0].weight_VH.clone().requires_grad_(), padded[0].bias_V)
    for objective in (Divergence(k=7), Divergence(support="full")):
        student.weight_VH.grad = None
        result = token_loss(
            objective, student, case.tokens, padded[1], weights_T=case.weights_T, vocab=Vocab(size=V), watch=5
        )
        result.total.backward()
        loss_T, grads = expected(objective, case)
        torch.testing.assert_close(result.loss_T, loss_T)
        torch.testing.assert_close(student.weight_VH.grad, torch.cat([grads[1], torch.zeros(9, H)]))


def test_signals() -> None:
    case = Case.make()
    p, q = (h @ w.T + b for h, w, b in (case.student, case.teacher))
    p, q = p.softmax(-1), q.softmax(-1)
    for objective in (Divergence(k=5), Divergence(support="full"), SampledReverseKL()):
        found = token_loss(
            objective, Head(*case.student), case.tokens, Head(*case.teacher), watch=5, chunk_size=4
        ).signals
        top_TK, other_TK = p.topk(5, -1).indices, q.topk(5, -1).indices
        sampled = case.tokens.ids_T[:, None]
        wanted = {
            "student/entropy": -(p * p.log()).sum(-1),
            "teacher/entropy": -(q * q.log()).sum(-1),
            "student/topk_mass": p.gather(-1, top_TK).sum(-1),
            "teacher/topk_mass": q.gather(-1, top_TK).sum(-1),
            "topk_overlap": torch.tensor(
                [len(set(a) & set(b)) / 5 for a, b in zip(top_TK.tolist(), other_TK.tolist(), strict=True)]
            ),
            "teacher/advantage": (q.gather(-1, sampled) / p.gather(-1, sampled)).log().squeeze(-1),
            "sampler/gap": (p.gather(-1, sampled).log().squeeze(-1) - case.tokens.sampler_logprobs_T).abs(),
            "sampler/ratio": p.gather(-1, sampled).squeeze(-1) / torch.exp(case.tokens.sampler_logprobs_T),
        }
        torch.testing.assert_close(found, wanted)


def test_signals_of_a_contrast_and_of_weights() -> None:
    case = Case.make()
    p, q, f = (h @ w.T + b for h, w, b in (case.student, case.teacher, case.failures))
    p, q, f = p.softmax(-1), q.softmax(-1), f.softmax(-1)
    sampled = case.tokens.ids_T[:, None]
    for objective in (CONTRASTS[0], SHARPER[2], WEIGHTED[0]):
        found = token_loss(
            objective, Head(*case.student), case.tokens, Head(*case.teacher), watch=5, **case.contrast(objective)
        ).signals
        assert list(found)[-2:] == ["sampler/gap", "sampler/ratio"]
        if objective.reads_contrast:
            wanted = (q.gather(-1, sampled) / f.gather(-1, sampled)).log().squeeze(-1)
            torch.testing.assert_close(found["teacher/contrast"], wanted)
        elif objective is WEIGHTED[0]:
            torch.testing.assert_close(found["token/weight"], -(p * p.log()).sum(-1) / math.log(V))
        else:
            wanted = -(q * q.log()).sum(-1) < -(p * p.log()).sum(-1)
            assert 0 < wanted.sum() < T
            torch.testing.assert_close(found["teacher/sharper"], wanted.double())


def test_tokens_at_which_the_teacher_is_not_sharper_give_no_gradient() -> None:
    case = Case.make()
    loss_T, (hidden, *_) = produced(SHARPER[0], case, "fused")
    plain_T, _ = produced(Divergence("jsd", 0.3, "student_topk", 30), case, "fused")
    kept = loss_T != 0
    assert 0 < kept.sum() < T
    torch.testing.assert_close(loss_T[kept], plain_T[kept])
    assert (hidden[~kept] == 0).all() and (hidden[kept] != 0).any(-1).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", WEIGHTED, ids=str)
def test_a_weight_scales_loss_and_gradient(objective: Divergence, form: str) -> None:
    case = Case.make()
    loss_T, (hidden, *_) = produced(objective, case, form)
    plain_T, (plain_hidden, *_) = produced(replace(objective, weights="none"), case, form)
    weight_T = loss_T / plain_T
    assert (weight_T > 0).all() and (weight_T < 1).all() and weight_T.std() > 0.01
    torch.testing.assert_close(hidden, plain_hidden * weight_T[:, None])


def test_only_unlikely_tokens_are_made_less_likely() -> None:
    case = Case.make()
    loss_T, (hidden, *_) = produced(Suppression(0.02), case, "fused")
    hidden_TH, weight_VH, bias_V = case.student
    logprobs_T = (hidden_TH @ weight_VH.T + bias_V).log_softmax(-1).gather(-1, case.tokens.ids_T[:, None]).squeeze(-1)
    unlikely = logprobs_T.exp() < 0.02
    assert 0 < unlikely.sum() < T and (loss_T[~unlikely] == 0).all() and (hidden[~unlikely] == 0).all()
    torch.testing.assert_close(loss_T[unlikely], logprobs_T[unlikely])
    ((h, w, b),) = [case.student]
    after = ((h - 0.1 * hidden) @ w.T + b).log_softmax(-1).gather(-1, case.tokens.ids_T[:, None]).squeeze(-1)
    assert (after[unlikely] < logprobs_T[unlikely]).all()


def test_a_weight_of_one_for_every_token_changes_no_bit() -> None:
    case = Case.make()
    hidden, weight, bias = case.teacher
    case.teacher = (hidden, weight * 20, bias)  # a teacher that is sharper everywhere
    (loss_T, gradients), (plain_T, plain) = (
        produced(Divergence("jsd", 0.3, "student_topk", 7, weights=weights), case, "fused")  # type: ignore[arg-type]
        for weights in ("sharper", "none")
    )
    assert torch.equal(loss_T, plain_T) and all(map(torch.equal, gradients, plain))


def test_a_clip_that_nothing_reaches_changes_nothing() -> None:
    case = Case.make()
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        plain = produced(Divergence(kind, 0.3, "student_topk", 7), case, "fused")
        clipped = produced(Divergence(kind, 0.3, "student_topk", 7, entry_clip=99.0), case, "fused")
        torch.testing.assert_close(clipped, plain)


def test_a_contrast_with_the_same_teacher_is_the_plain_divergence() -> None:
    case = Case.make()
    case.failures = case.teacher
    plain = produced(Divergence("jsd", 0.3, "student_topk", 7), case, "fused")
    torch.testing.assert_close(produced(CONTRASTS[0], case, "fused"), plain)


def test_a_contrast_asks_for_both_teachers_and_nothing_else_does() -> None:
    case = Case.make()
    student, teacher = Head(*case.student), Head(*case.teacher)
    with pytest.raises(ValueError, match="needs a teacher after failures"):
        token_loss(CONTRASTS[0], student, case.tokens, teacher)
    with pytest.raises(ValueError, match="does not read a teacher after failures"):
        token_loss(Divergence(), student, case.tokens, teacher, contrast=teacher)
    with pytest.raises(ValueError, match="apply `reference"):
        topk = TopK(torch.zeros(T, 1, dtype=torch.long), torch.zeros(T, 1))
        token_loss(CONTRASTS[1], student, case.tokens, topk, contrast=teacher)
    with pytest.raises(ValueError, match="take student_topk or teacher_topk"):
        Divergence(support="full", contrast=1.0)


def test_bfloat16_head_accumulates_in_float32() -> None:
    """bfloat16 products, float32 statistics: as near to float64 as the rounding of the logits allows."""
    case = Case.make(rows=64, dtype=torch.bfloat16)
    exact = Case(
        *(tuple(x.double() for x in xs) for xs in (case.student, case.teacher)),
        case.tokens,
        case.weights_T.double(),
        case.failures,
    )
    for objective in (Divergence(k=7), Divergence(support="full")):
        case.weights_T = exact.weights_T.float()
        loss_T, grads = produced(objective, case, "fused", chunk_size=4)
        wanted_T, wanted = expected(objective, exact)
        assert loss_T.dtype == torch.float32
        assert [g.dtype for g in grads] == [torch.bfloat16] * 3
        assert (loss_T - wanted_T).abs().max() < 0.02
        for got, want in zip(grads, wanted, strict=True):
            assert (got.double() - want).norm() < 0.02 * want.norm()


def test_autocast_computes_in_its_type_and_keeps_wide_gradients() -> None:
    case = Case.make(dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for x in case.student]
    with torch.autocast("cpu", torch.bfloat16):
        result = token_loss(Divergence(k=7), Head(*leaves), case.tokens, Head(*case.teacher), weights_T=case.weights_T)
    result.total.backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)
    wanted = expected(Divergence(k=7), case)[1]
    difference = (leaves[1].grad - wanted[1]).norm() / wanted[1].norm()
    assert 1e-5 < difference < 0.03


def test_a_second_backward_pass_of_the_fused_form_is_refused() -> None:
    case = Case.make()
    leaves = [x.clone().requires_grad_() for x in case.student]
    total = token_loss(LogLikelihood(), Head(*leaves), case.tokens, weights_T=case.weights_T).total
    (2 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_frozen_parts_get_no_gradient_and_no_grad_makes_none() -> None:
    case = Case.make()
    hidden, weight, bias = (x.clone() for x in case.student)
    token_loss(
        LogLikelihood(), Head(hidden.requires_grad_(), weight, bias), case.tokens, weights_T=case.weights_T
    ).total.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not token_loss(
            LogLikelihood(), Head(hidden, weight), case.tokens, weights_T=case.weights_T
        ).total.requires_grad


def test_dpo_over_summed_tokens() -> None:
    case = Case.make()
    leaves = [x.clone().requires_grad_() for x in case.student]
    result = token_loss(LogLikelihood(), Head(*leaves), case.tokens)
    chosen, rejected = -result.loss_T[:6].sum()[None], -result.loss_T[6:].sum()[None]
    dpo_loss(chosen, rejected, chosen.detach() + 1, rejected.detach(), beta=0.5).sum().backward()
    plain = [x.clone().requires_grad_() for x in case.student]
    loss_T = reference(LogLikelihood(), plain[0] @ plain[1].T + plain[2], case)
    chosen, rejected = -loss_T[:6].sum()[None], -loss_T[6:].sum()[None]
    dpo_loss(chosen, rejected, chosen.detach() + 1, rejected.detach(), beta=0.5).sum().backward()
    torch.testing.assert_close([x.grad for x in leaves], [x.grad for x in plain])


@pytest.mark.parametrize(
    ("objective", "teacher", "tokens", "arguments", "message"),
    [
        (Divergence(), None, {}, {}, "Divergence needs a teacher"),
        (Divergence(), "short", {}, {}, "rows do not match: {'student': 13, 'tokens': 13, 'teacher': 12}"),
        (Divergence(), "narrow", {}, {}, "teacher has 39 columns, student 40"),
        (Divergence(), "topk", {}, {}, "support=student_topk needs a teacher's logits"),
        (Divergence(support="teacher_topk", k=8), "topk", {}, {}, "k=8 but the teacher gives 7"),
        (SampledReverseKL(), "topk", {}, {}, "log-probability of the sampled token"),
        (PolicyGradient(), None, {}, {}, "needs tokens.advantages_T"),
        (LogLikelihood(), None, {}, {"importance_clip": 2.0}, "needs tokens.sampler_logprobs_T"),
        (LogLikelihood(), None, {}, {"vocab": Vocab(size=41)}, "vocabulary of 41 over 1 ranks of 40"),
    ],
)
def test_what_does_not_fit_is_refused(objective, teacher, tokens, arguments, message: str) -> None:
    case = Case.make()
    hidden, weight, bias = case.teacher
    sources = {
        None: None,
        "short": Head(hidden[1:], weight, bias),
        "narrow": Head(hidden, weight[1:]),
        "topk": TopK(torch.zeros(T, 7, dtype=torch.long), torch.zeros(T, 7)),
    }
    with pytest.raises(ValueError, match=message):
        token_loss(objective, Head(*case.student), Tokens(case.tokens.ids_T), sources[teacher], **arguments)


def test_objectives_refuse_what_is_no_divergence() -> None:
    with pytest.raises(ValueError, match="0 < alpha < 1"):
        Divergence("jsd", alpha=1.0)
    with pytest.raises(ValueError, match="k=0"):
        Divergence(k=0)
