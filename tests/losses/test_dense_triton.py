"""The Triton kernels against the plain passes: on a GPU, or in Triton's interpreter (tests/conftest.py turns it on)."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mopd_nemo.losses import dense
from mopd_nemo.losses.dense import BLOCK

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


def read(module: ModuleType, logits_CV: torch.Tensor, owned: bool = False) -> dense.Chunk:
    return module.read(logits_CV.clone() if owned else logits_CV, whole=False, mean=True, blocks=True, owned=owned)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_read(kernels: ModuleType, width: int, dtype: torch.dtype) -> None:
    logits_CV = pair(width, dtype)[0]
    got, want = read(kernels, logits_CV), read(dense, logits_CV)
    for name in ("lse_C", "mean_C", "maxima_CB"):
        torch.testing.assert_close(getattr(got, name).float(), getattr(want, name), rtol=1e-5, atol=1e-5)
    bare = kernels.read(logits_CV, whole=True, mean=False, blocks=False, owned=False)
    assert (bare.mean_C, bare.maxima_CB) == (None, None)
    columns_first = kernels.read(logits_CV.T.contiguous().T, whole=True, mean=False, blocks=False, owned=False)
    torch.testing.assert_close(columns_first.lse_C, got.lse_C)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("owned", [True, False])
def test_support_gradient(kernels: ModuleType, width: int, dtype: torch.dtype, owned: bool) -> None:
    logits_CV = pair(width, dtype)[0]
    columns_CN = torch.stack([torch.randperm(width)[:7] for _ in range(3)]).to(DEVICE)
    inside_CN = torch.rand(3, 7, device=DEVICE) < 0.6
    g_CN = torch.randn(3, 7, device=DEVICE)
    want = dense.support_gradient(read(dense, logits_CV), columns_CN, inside_CN, g_CN)
    before = logits_CV.clone()
    got = kernels.support_gradient(read(kernels, logits_CV, owned), columns_CN, inside_CN, g_CN)
    close(got.float(), want, dtype)
    assert torch.equal(logits_CV, before)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_full_divergence(kernels: ModuleType, width: int, dtype: torch.dtype, kind) -> None:
    logits = pair(width, dtype)
    weights_C = torch.tensor([0.5, 2.0, 0.0], device=DEVICE)
    want_C, want_CV = dense.full_divergence(*(read(dense, x) for x in logits), kind, 0.3, weights_C, lambda x: x)
    for owned in (False, True):
        chunks = [read(kernels, x, owned) for x in logits]
        got_C, got_CV = kernels.full_divergence(*chunks, kind, 0.3, weights_C, lambda x: x)
        torch.testing.assert_close(got_C, want_C, rtol=1e-4, atol=1e-5)
        close(got_CV.float(), want_CV, dtype)
    chunks = [read(kernels, x) for x in logits]
    assert kernels.full_divergence(*chunks, kind, 0.3, None, lambda x: x)[1] is None


@pytest.mark.parametrize("name", ["dense", "kernels"])
def test_columns_that_underflow_in_both_count_nothing(kernels: ModuleType, name: str) -> None:
    logits_CV = torch.full((1, 200), -300.0, device=DEVICE)
    logits_CV[0, :2] = 0.0
    module = kernels if name == "kernels" else dense
    weights_C = torch.ones(1, device=DEVICE)
    both = (read(module, logits_CV), read(module, logits_CV))
    loss_C, grad_CV = module.full_divergence(*both, "jsd", 0.5, weights_C, lambda x: x)
    torch.testing.assert_close(loss_C, torch.zeros_like(loss_C), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(grad_CV, torch.zeros_like(grad_CV), atol=1e-6, rtol=0.0)


def test_kernels_compile_for_a_gpu(kernels: ModuleType, tmp_path: Path) -> None:
    settings = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    helper = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, **settings}
    done = subprocess.run([sys.executable, helper], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
