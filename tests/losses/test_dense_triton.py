"""The Triton kernels against the plain passes: on a GPU, or in Triton's interpreter (tests/conftest.py turns it on)."""

import importlib
from types import ModuleType

import pytest
import torch

from mopd_nemo.losses import dense
from mopd_nemo.losses.topk import BLOCK

KINDS = ["forward_kl", "reverse_kl", "jsd"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = [BLOCK * 3 + 5, 4096, 4096 * 2 + 130]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed (it comes with CUDA builds of torch)")
    return importlib.import_module("mopd_nemo.losses.dense_triton")


def pair(width: int, dtype: torch.dtype, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(width)) * 3
    both[0, 0, width // 2] = 40.0  # one row all but certain
    return both[0].to(DEVICE, dtype), both[1].to(DEVICE, dtype)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(kernels: ModuleType, width: int, dtype: torch.dtype) -> None:
    logits_CV = pair(width, dtype)[0]
    for got, want in zip(
        kernels.statistics(logits_CV, mean=True, blocks=True), dense.statistics(logits_CV, True, True), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert kernels.statistics(logits_CV, mean=False, blocks=False)[1:] == (None, None)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("owned", [True, False])
def test_support_gradient(kernels: ModuleType, width: int, dtype: torch.dtype, owned: bool) -> None:
    logits_CV = pair(width, dtype)[0]
    lse_C = dense.statistics(logits_CV, False, False)[0]
    columns_CN = torch.stack([torch.randperm(width)[:7] for _ in range(3)]).to(DEVICE)
    inside_CN = torch.rand(3, 7, device=DEVICE) < 0.6
    g_CN = torch.randn(3, 7, device=DEVICE)
    want = dense.support_gradient(logits_CV.float(), lse_C, columns_CN, inside_CN, g_CN, False)
    before = logits_CV.clone()
    got = kernels.support_gradient(logits_CV, lse_C, columns_CN, inside_CN, g_CN, owned)
    close(got.float(), want, dtype)
    assert owned or torch.equal(logits_CV, before)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence(kernels: ModuleType, width: int, dtype: torch.dtype, kind) -> None:
    student_CV, teacher_CV = pair(width, dtype)
    lse = [dense.statistics(x, False, False)[0] for x in (student_CV, teacher_CV)]
    got = kernels.divergence_sums(student_CV, teacher_CV, *lse, kind, 0.3)
    want = dense.divergence_sums(student_CV, teacher_CV, *lse, kind, 0.3)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    weights_C = torch.tensor([0.5, 2.0, 0.0], device=DEVICE)
    want = dense.divergence_gradient(
        student_CV.float(), teacher_CV.float(), *lse, want[1], weights_C, kind, 0.3, owned=False
    )
    for owned in (False, True):
        found = kernels.divergence_gradient(student_CV, teacher_CV, *lse, got[1], weights_C, kind, 0.3, owned)
        close(found.float(), want, dtype)


def test_columns_that_underflow_in_both_count_nothing(kernels: ModuleType) -> None:
    logits_CV = torch.full((1, 200), -300.0, device=DEVICE)
    logits_CV[0, :2] = 0.0
    lse_C = dense.statistics(logits_CV, False, False)[0]
    sums = kernels.divergence_sums(logits_CV, logits_CV.clone(), lse_C, lse_C, "jsd", 0.5)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-6, rtol=0.0)
