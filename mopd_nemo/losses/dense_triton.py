"""The passes of `dense.py` as Triton kernels: each reads a chunk of logits once and keeps float32 in registers.

Imported only for tensors on a GPU. Same functions, same arguments, same results up to rounding; float64 stays with
`dense.py`. One program handles one row, or one tile of a row where rows are independent.

Shape suffixes: C tokens of a chunk, V local columns, N chosen tokens, B blocks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopd_nemo.losses.dense import BLOCK, Chunk, Reduce
from mopd_nemo.losses.objectives import DivergenceKind

TILE = 4096
WARPS = 8
KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def read(logits_CV: Tensor, *, whole: bool, mean: bool, blocks: bool, owned: bool) -> Chunk:
    """As `dense.read`, in one pass; the values stay the logits."""
    del whole
    if logits_CV.stride(-1) != 1:
        logits_CV, owned = logits_CV.contiguous(), True
    rows, width = logits_CV.shape
    lse_C = logits_CV.new_empty(rows, dtype=torch.float32)
    mean_C = torch.empty_like(lse_C) if mean else lse_C
    maxima_CB = logits_CV.new_empty(rows, -(-width // BLOCK) if blocks else 1)
    with _on(logits_CV):
        _read_kernel[(rows,)](
            logits_CV, lse_C, mean_C, maxima_CB, logits_CV.stride(0), maxima_CB.stride(0),
            WIDTH=width, MEAN=mean, BLOCKS=blocks, TILE=TILE, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return Chunk(logits_CV, lse_C, mean_C if mean else None, maxima_CB if blocks else None, owned)


def support_gradient(student: Chunk, columns_CN: Tensor, inside_CN: Tensor, g_CN: Tensor) -> Tensor:
    """As `dense.support_gradient`; the support's own entries are rounded once, after the subtraction."""
    logits_CV, lse_C = student.values_CV, student.lse_C
    assert lse_C is not None
    rows, width = logits_CV.shape
    total_C1 = g_CN.sum(-1, keepdim=True)
    p_CN = (logits_CV.gather(-1, columns_CN).float() - lse_C[:, None]).exp_()
    values_CN = g_CN - p_CN * total_C1
    columns_CN = torch.where(inside_CN, columns_CN, -1)
    grad_CV = logits_CV if student.owned else torch.empty_like(logits_CV)
    with _on(logits_CV):
        _softmax_kernel[(rows, triton.cdiv(width, TILE))](
            logits_CV, grad_CV, lse_C, -total_C1, logits_CV.stride(0), grad_CV.stride(0), width,
            TILE=TILE, num_warps=WARPS,
        )  # fmt: skip
        _scatter_kernel[(rows,)](
            grad_CV, columns_CN.contiguous(), values_CN.contiguous(), grad_CV.stride(0), columns_CN.shape[-1],
            LANES=triton.next_power_of_2(columns_CN.shape[-1]), num_warps=1,
        )  # fmt: skip
    return grad_CV


def full_divergence(
    student: Chunk, teacher: Chunk, kind: DivergenceKind, alpha: float, weights_C: Tensor | None, reduce: Reduce
) -> tuple[Tensor, Tensor | None]:
    """As `dense.full_divergence`: one pass over both for the sums, one for the gradient."""
    student_CV, teacher_CV, student_lse_C, teacher_lse_C = (
        student.values_CV, teacher.values_CV, student.lse_C, teacher.lse_C
    )  # fmt: skip
    assert student_lse_C is not None
    rows, width = student_CV.shape
    sums = student_lse_C.new_empty(2, rows)
    with _on(student_CV):
        _sums_kernel[(rows,)](
            student_CV, teacher_CV, student_lse_C, teacher_lse_C, sums[0], sums[1],
            student_CV.stride(0), teacher_CV.stride(0),
            WIDTH=width, ALPHA=alpha, KIND=KINDS[kind], TILE=TILE, num_warps=WARPS,
        )  # fmt: skip
    loss_C, inner_C = reduce(sums)
    if weights_C is None:
        return loss_C, None
    grad_CV = student_CV if student.owned else torch.empty_like(student_CV)
    with _on(student_CV):
        _gradient_kernel[(rows, triton.cdiv(width, TILE))](
            student_CV, teacher_CV, grad_CV, student_lse_C, teacher_lse_C, inner_C, weights_C.float().contiguous(),
            student_CV.stride(0), teacher_CV.stride(0), grad_CV.stride(0), width,
            ALPHA=alpha, KIND=KINDS[kind], TILE=TILE, num_warps=WARPS,
        )  # fmt: skip
    return loss_C, grad_CV


@triton.jit
def _read_kernel(
    logits, lse, mean, maxima, stride, maxima_stride,
    WIDTH: tl.constexpr, MEAN: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    top = -1e30
    partition = 0.0
    moment = 0.0
    for start in range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        x = _load(logits + columns, columns < WIDTH)
        if BLOCKS:
            block = start // BLOCK + tl.arange(0, TILE // BLOCK)
            best = tl.max(tl.reshape(x, (TILE // BLOCK, BLOCK)), axis=1)
            tl.store(maxima + row * maxima_stride + block, best.to(maxima.dtype.element_ty), mask=block * BLOCK < WIDTH)
        higher = tl.maximum(top, tl.max(x, axis=0))
        weight = tl.exp(x - higher)
        decay = tl.exp(top - higher)
        partition = partition * decay + tl.sum(weight, axis=0)
        if MEAN:
            moment = moment * decay + tl.sum(weight * x, axis=0)
        top = higher
    tl.store(lse + row, top + tl.log(partition))
    if MEAN:
        tl.store(mean + row, moment / partition)


@triton.jit
def _softmax_kernel(logits, grad, lse, scale, stride, grad_stride, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < width
    x = _load(logits + row * stride + columns, mask)
    value = tl.exp(x - tl.load(lse + row)) * tl.load(scale + row)
    tl.store(grad + row * grad_stride + columns, value.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _scatter_kernel(grad, columns, values, stride, count, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    column = tl.load(columns + row * count + lane, mask=lane < count, other=-1)
    value = tl.load(values + row * count + lane, mask=lane < count, other=0.0)
    tl.store(grad + row * stride + column, value.to(grad.dtype.element_ty), mask=column >= 0)


@triton.jit
def _sums_kernel(
    student, teacher, student_lse, teacher_lse, loss, inner, stride, teacher_stride,
    WIDTH: tl.constexpr, ALPHA: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * teacher_stride
    student_z = tl.load(student_lse + row)
    teacher_z = tl.load(teacher_lse + row)
    first = tl.zeros([TILE], dtype=tl.float32)
    second = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        mask = columns < WIDTH
        a = _load(student + columns, mask) - student_z
        b = _load(teacher + columns, mask) - teacher_z
        if KIND == 0:
            first += tl.exp(b) * (b - a)
        if KIND == 1:
            first += tl.exp(a) * (a - b)
        if KIND == 2:
            p = tl.exp(a)
            q = tl.exp(b)
            m = _log_mixture(p, q, ALPHA)
            first += p * (a - m)
            second += q * (b - m)
    total = tl.sum(first, axis=0)
    if KIND == 2:
        tl.store(loss + row, (1.0 - ALPHA) * total + ALPHA * tl.sum(second, axis=0))
    else:
        tl.store(loss + row, total)
    tl.store(inner + row, total)


@triton.jit
def _gradient_kernel(
    student, teacher, grad, student_lse, teacher_lse, inner, weights, stride, teacher_stride, grad_stride, width,
    ALPHA: tl.constexpr, KIND: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < width
    a = _load(student + row * stride + columns, mask) - tl.load(student_lse + row)
    b = _load(teacher + row * teacher_stride + columns, mask) - tl.load(teacher_lse + row)
    p = tl.exp(a)
    if KIND == 0:
        value = p - tl.exp(b)
    elif KIND == 1:
        value = p * (a - b - tl.load(inner + row))
    else:
        m = _log_mixture(p, tl.exp(b), ALPHA)
        value = (1.0 - ALPHA) * p * (a - m - tl.load(inner + row))
    value *= tl.load(weights + row)
    tl.store(grad + row * grad_stride + columns, value.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _load(pointers, mask):
    """float32 logits; -1e30, whose exponential is 0, outside the mask."""
    return tl.where(mask, tl.load(pointers, mask=mask, other=0.0).to(tl.float32), -1e30)


@triton.jit
def _log_mixture(p, q, ALPHA: tl.constexpr):
    """log((1-α)p + αq); finite where both underflow, because p and q then multiply it by 0."""
    return tl.log(tl.maximum((1.0 - ALPHA) * p + ALPHA * q, 1e-37))


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
