"""Compile every kernel of `dense_triton.py` for an H100, which needs no GPU; a helper of test_dense_triton.py."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mopd_nemo.losses import dense_triton as kernels

NUMBERS = {"stride", "maxima_stride", "grad_stride", "teacher_stride", "width", "count"}
LOGITS = {"logits", "maxima", "grad", "student", "teacher"}


def build(kernel, dtype: str, **constants: object) -> None:
    """Compile, and refuse double precision, which a stray literal brings in and which is slow."""

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in NUMBERS:
            return "i32"
        return dtype if name in LOGITS else "*i64" if name == "columns" else "*fp32"

    source = ASTSource(kernel, {name: type_of(name) for name in kernel.arg_names}, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    assert ".f64" not in built.asm["ptx"], kernel.__name__


tile = {"TILE": kernels.TILE}
for asked in (True, False):
    build(kernels._read_kernel, "*bf16", WIDTH=151936, MEAN=asked, BLOCKS=asked, BLOCK=kernels.BLOCK, **tile)
build(kernels._softmax_kernel, "*fp32", **tile)
build(kernels._scatter_kernel, "*bf16", LANES=128)
for kind in kernels.KINDS.values():
    build(kernels._sums_kernel, "*bf16", WIDTH=151936, ALPHA=0.5, KIND=kind, **tile)
    build(kernels._gradient_kernel, "*bf16", ALPHA=0.5, KIND=kind, **tile)
