"""The part of `bench/gpu.py` that compares ways to read eight responses that share a context.

Padded rows, the engine's tree, and the same tree by FlexAttention, which the engine does not have. Each says how far it
is from one row at a time in float32.

Shape suffixes: S tokens of the tree, Q these and padding, J segments and one for the padding, T response tokens, N
heads, G those of keys, D head size, H hidden size.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad

from bench.gpu_engine import Ids, Row, Sizes, clear, flops, random_weights, timed, write_model
from bench.peak import Peak
from mopd_nemo.engines.local.model import LanguageModel, load_model
from mopd_nemo.engines.local.prefix_tree import PrefixTree, Segments, build_tree

FLEX = "tree by FlexAttention"
FORMS = ("padded", "tree", FLEX)
BUCKET = 1024
"""Lengths are padded to a multiple of this, so that few shapes are compiled."""


def attention(sizes: Sizes, device: str, tell: Callable[[Row], None]) -> None:
    """Scoring and gradients by each form: seconds, peak memory, and the operations that take most time."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as directory, random_weights(device):
        path = str(write_model(Path(directory), sizes.model))
        model = load_model(
            path, key="model.path", dtype=dtype, weights=torch.float32, device=torch.device(device)
        )  # fmt: skip
    assert model.reads_trees, "the tree disagrees with padded rows on this device"
    jobs = []
    for context, response in sizes.trees:
        rng = random.Random(0)
        shared = tuple(rng.randrange(5, sizes.model.vocab) for _ in range(context))
        rows = [tuple(rng.randrange(5, sizes.model.vocab) for _ in range(response)) for _ in range(8)]
        jobs += [Job(model, shared, rows, phase, sizes.micro_batch) for phase in ("score", "update")]
    work = [flops(sizes.model, [job.shared] * 8, job.rows, head=0) * (1 + 2 * job.grad) for job in jobs]
    exact = [job.exact() if job.shared == jobs[0].shared else None for job in jobs]
    padded: dict[str, float] = {}
    for form in FORMS:  # FlexAttention, which is compiled, last: a time limit costs no other row
        for job, need, right in zip(jobs, work, exact, strict=True):
            row: Row = {"what": f"{job.name}, {form}", "flops": need} | _row(job, form, right, device)
            if form == "padded" and "seconds" in row:
                padded[job.name] = row["seconds"]
            elif job.name in padded and "seconds" in row:
                row["note"] = f"{padded[job.name] / row['seconds']:.2f} x as fast as padded, {row['note']}".rstrip(", ")
            tell(row)
            clear(device)


@dataclass(frozen=True)
class Job:
    """Responses of one context to be read."""

    model: LanguageModel
    shared: Ids
    rows: Sequence[Ids]
    phase: str
    budget: int
    """Tokens of a micro-batch."""

    @property
    def grad(self) -> bool:
        return self.phase == "update"

    @property
    def name(self) -> str:
        return f"{self.phase}, 8 x {len(self.rows[0]):,} after {len(self.shared):,}"

    def run(self) -> dict[str, Tensor]:
        """Hidden states of each batch; for an update the gradients of the sum of their squares, by parameter."""
        tokens = self.budget if self.grad else max(2 * self.budget, 4 * (len(self.shared) + len(self.rows[0])))
        hidden: dict[str, Tensor] = {}
        with torch.set_grad_enabled(self.grad):
            for batch in self.model.batches([[self.shared + row] for row in self.rows], tokens):
                with self.model.computing():
                    states_TH = self.model.response_hidden_TH([self.shared] * len(batch), [self.rows[i] for i in batch])
                if self.grad:
                    states_TH.float().square().sum().backward()
                else:
                    parts = states_TH.split([len(self.rows[i]) for i in batch])
                    hidden |= {str(i): part for i, part in zip(batch, parts, strict=True)}
        gradients = {n: p.grad for n, p in self.model.named_parameters().items() if p.grad is not None}
        self.model.module.zero_grad(set_to_none=True)
        return gradients if self.grad else hidden

    def exact(self) -> dict[str, Tensor]:
        """The result in float32, one row at a time."""
        kept = self.model.dtype, self.model.reads_trees
        self.model.dtype, self.model.reads_trees = torch.float32, False
        try:
            return replace(self, budget=0).run() if self.grad else self._rows_alone()
        finally:
            self.model.dtype, self.model.reads_trees = kept

    def _rows_alone(self) -> dict[str, Tensor]:
        alone = (replace(self, rows=[row]).run()["0"] for row in self.rows)
        return {str(number): states_TH for number, states_TH in enumerate(alone)}


def _row(job: Job, form: str, exact: dict[str, Tensor] | None, device: str) -> Row:
    """What is found of a job by one form; its own failure is an error in the row."""
    if form == FLEX and job.grad and device == "cpu":
        return {"note": "torch has no gradients of FlexAttention on a CPU"}
    try:
        with reading(job.model, form):
            row = _measured(job, form, device) | {"note": ""}
            if exact is not None:
                row["distance"] = _distance(job.run(), exact)
                row["note"] = f"{row['distance']:.1e} from float32"
            return row
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0]}
    except Exception as error:  # a form that this torch cannot compile takes no other with it
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def _measured(job: Job, form: str, device: str) -> Row:
    """Seconds of the faster of two runs after one to warm up, the peak, and the longest operations."""
    if form == FLEX and device == "cpu":  # it does not run where memory is tracked
        found = [timed(device, job.run)[0] for _ in range(3)]
        return {"seconds": min(found[1:])}
    with Peak(device) as peak:
        found = [timed(device, job.run)[0] for _ in range(3)]
    return {"seconds": min(found[1:]), "gib": peak.bytes / 2**30, "top": _profile(job.run)}


def _distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The norm of the difference over the norm of what is exact."""
    assert found.keys() == exact.keys()
    difference = sum((found[name].float() - exact[name].float()).square().sum().item() for name in exact)
    return (difference / sum(x.float().square().sum().item() for x in exact.values())) ** 0.5


def _profile(work: Callable[[], Any]) -> list[str]:
    """The operations that take most time, with their milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        work()
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, spent))[:8]
    return [f"{getattr(row, spent) / 1000:.2f} ms, {row.count} x {row.key[:80]}" for row in rows]


# ------------------------------------------------------------------------------------------------ FlexAttention


@contextmanager
def reading(model: LanguageModel, form: str) -> Iterator[None]:
    """Inside, the model reads sequences in one of `FORMS`."""
    model.reads_trees = form != "padded"
    flex = patch("mopd_nemo.engines.local.model.build_tree", flex_tree) if form == FLEX else nullcontext()
    try:
        with flex:
            yield
    finally:
        model.reads_trees = True


def flex_tree(sequences: Sequence[Ids], device: torch.device, *, flash: bool = False) -> PrefixTree:
    """`build_tree` with FlexAttention."""
    tree = build_tree(sequences, device, flash=True)
    assert isinstance(tree.attention, Segments)
    return replace(tree, attention=Flex.of(tree.attention))  # pyrefly: ignore[bad-argument-type]


@dataclass(frozen=True)
class Flex:
    """Attention of a tree in one call of FlexAttention, under a mask by blocks."""

    mask: BlockMask
    padding: int

    @classmethod
    def of(cls, segments: Segments) -> Flex:
        """The mask: a token sees all of the segments above its own, and its own up to itself."""
        device = segments.keys_C.device
        ends = segments.query_ends_J.tolist()
        total, padded = ends[-1], -(-ends[-1] // BUCKET) * BUCKET
        lengths = segments.query_ends_J.diff()
        segment_S = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        segment_Q = pad(segment_S, (0, padded - total), value=len(lengths))  # padding sees itself alone
        sees_JJ = torch.eye(len(lengths) + 1, dtype=torch.bool, device=device)
        of_key_C = torch.arange(len(lengths), device=device).repeat_interleave(segments.key_ends_J.diff())
        sees_JJ[of_key_C, segment_S[segments.keys_C]] = True

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return sees_JJ[segment_Q[query], segment_Q[key]] & (key <= query)

        return cls(
            _compiled(create_block_mask, device.type)(visible, None, None, padded, padded, device), padded - total
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention as `tree_attention` has it, [1, S, heads, D]."""
        query_1NQD, key_1GQD, value_1GQD = (pad(x, (0, 0, 0, self.padding)) for x in (query, key, value))
        attend = _compiled(flex_attention, query.device.type)
        found_1NQD = attend(query_1NQD, key_1GQD, value_1GQD, block_mask=self.mask, scale=scale, enable_gqa=True)
        return found_1NQD[:, :, : query.shape[2]].transpose(1, 2)


@cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """On a GPU a kernel for each shape; a CPU is for trying whether the mask is right."""
    return torch.compile(function, dynamic=False) if device == "cuda" else function
