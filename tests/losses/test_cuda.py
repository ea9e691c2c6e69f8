"""The production loss on a GPU against the plain reference in float64."""

import pytest
import torch

from mopd_nemo.losses.logits import Head, Logits, Tokens
from mopd_nemo.losses.objectives import Divergence, LogLikelihood, SampledReverseKL
from mopd_nemo.losses.reference import token_divergence
from mopd_nemo.losses.token_loss import token_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OBJECTIVES = [
    Divergence(kind, 0.3, support, 20, tail)  # type: ignore[arg-type]
    for kind in ("forward_kl", "reverse_kl", "jsd")
    for support, tail in [("full", True), ("student_topk", True), ("student_topk", False), ("teacher_topk", True)]
]


@pytest.mark.parametrize("form", ["fused", "recomputed", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_equals_the_reference(objective: Divergence, dtype: torch.dtype, form: str) -> None:
    tokens, hidden, vocab = 300, 64, 20_003
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    leaves = [normal(tokens, hidden), normal(vocab, hidden) / 8]
    teacher = [(leaves[0] + 0.5 * normal(tokens, hidden)), leaves[1] + normal(vocab, hidden) / 16]
    weights_T = torch.rand(tokens, device="cuda", generator=generator)
    exact = [x.double().requires_grad_() for x in leaves]
    # The reference starts from logits of the same precision: top-k sets must agree.
    logits = [(h @ w.T).double() for h, w in (leaves, teacher)]
    student = logits[0].requires_grad_()
    arguments = {name: getattr(objective, name) for name in objective.__slots__}
    loss_T = token_divergence(student, logits[1], **arguments)
    (grad,) = torch.autograd.grad((loss_T * weights_T).sum(), student)
    wanted = [grad @ exact[1], grad.T @ exact[0]]

    leaves = [x.requires_grad_() for x in leaves]
    source = Logits(leaves[0] @ leaves[1].T) if form == "logits" else Head(*leaves)
    ids_T = torch.randint(0, vocab, (tokens,), device="cuda", generator=generator)
    result = token_loss(
        objective, source, Tokens(ids_T), Head(*teacher), weights_T=None if form == "recomputed" else weights_T,
        chunk_size=128, watch=20,
    )  # fmt: skip
    ((result.loss_T * weights_T).sum() if form == "recomputed" else result.total).backward()
    tolerance = 2e-4 if dtype == torch.float32 else 2e-2
    assert (result.loss_T.double() - loss_T).abs().max() < tolerance * loss_T.abs().max()
    for leaf, want in zip(leaves, wanted, strict=True):
        assert leaf.grad is not None
        assert (leaf.grad.double() - want).norm() < tolerance * want.norm()


def test_float64_and_the_sampled_objectives_run() -> None:
    hidden, weight = torch.randn(40, 16, device="cuda"), torch.randn(9000, 16, device="cuda")
    tokens = Tokens(torch.randint(0, 9000, (40,), device="cuda"))
    weights_T = torch.rand(40, device="cuda")
    for objective in (SampledReverseKL(), LogLikelihood(), Divergence(k=20), Divergence(support="full")):
        grads = []
        for dtype in (torch.float32, torch.float64):
            leaf = weight.to(dtype).requires_grad_()
            teacher = Head(hidden.roll(1, 0).to(dtype), weight.to(dtype))
            result = token_loss(objective, Head(hidden.to(dtype), leaf), tokens, teacher, weights_T=weights_T)
            result.total.backward()
            assert leaf.grad is not None
            grads.append(leaf.grad.double())
        assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()
