"""The cost model's FLOP, at this CPU's speed of matrix products, against measured phases of the embedded model.

The machine is calibrated, not the cost model: this CPU's time for the layers' products at a phase's number of rows, for
attention, and for attention with one query. A prediction is FLOP divided by these rates. It leaves out norms,
rotations, the rest of the loss, sampling and Python, which take a large part of the time of so small a model. If
predicted / measured stays about the same from job to job, the cost model counts the right things. One thread, and the
process's own time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import PreTrainedModel

from bench.cost import Reading, attention_flops, head_flops, linear_flops
from bench.step_curves import Job, never_ending
from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.engines.architecture import Architecture, architecture_of
from mopd_nemo.run import display

CONFIG = Path(__file__).parent.parent / "configs/quickstart.yaml"
REPEATS = 5
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s of this CPU at the sizes of one phase."""

    linear: float
    attention: float
    head: float

    def seconds(self, model: Architecture, readings: Sequence[Reading], passes: float = 1.0) -> float:
        return passes * sum(
            linear_flops(model, r) / self.linear
            + attention_flops(model, r) / self.attention
            + head_flops(model, r) / self.head
            for r in readings
        )


def timed(work: Callable[[], object]) -> float:
    """Median seconds of a call, over at least 0.2 s of calls."""
    work()
    found: list[float] = []
    while len(found) < 5 or sum(found) < 0.2:
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return median(found)


@torch.inference_mode()
def calibrate(module: PreTrainedModel, model: Architecture, rows: int, batch: int, queries: int, keys: int) -> Rates:
    """Rates for the model's own weights and attention shapes.

    Args:
        rows: that the layers see at once.
        batch, queries, keys: of an attention; causal when there are as many queries as keys.
    """
    weights = [m.weight for m in module.base_model.modules() if isinstance(m, nn.Linear)]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1]) for w in weights}
    per_row = 2 * sum(w.numel() for w in weights)
    output = module.get_output_embeddings()
    assert output is not None
    head = output.weight
    flops = rows * per_row
    query = torch.randn(batch, model.heads, queries, model.head_dim)
    key, value = (torch.randn(batch, model.heads, keys, model.head_dim) for _ in range(2))
    pairs = Reading(batch, queries, cached=keys - queries).pairs
    attention = batch * 4 * model.heads * model.head_dim * pairs
    causal = queries == keys
    return Rates(
        flops / timed(lambda: [linear(inputs[w.shape[1]], w) for w in weights]),
        attention / timed(lambda: scaled_dot_product_attention(query, key, value, is_causal=causal)),
        rows * 2 * head.numel() / timed(lambda: linear(inputs[head.shape[1]], head)),
    )


def readings(rows: Sequence[tuple[Ids, Ids]], computed: float) -> list[Reading]:
    """As the engine reads prompts and responses: each prompt once, and of the responses, which also begin alike, the
    share that makes up the tokens that its metrics say it has computed."""
    prompts = {prompt for prompt, _ in rows}
    share = (computed - sum(map(len, prompts))) / sum(len(response) for _, response in rows)
    return [
        *(Reading(1, len(prompt)) for prompt in prompts),
        *(Reading(share, len(response), cached=len(prompt)) for prompt, response in rows),
    ]


def predict(job: Job, model: Architecture) -> dict[str, float]:
    """Seconds of the phases of the job's last step. The teacher's head is applied in the update."""
    module, budget = job.engine.student.module, job.config.train.tokens_per_micro_batch
    group = job.config.rollout.num_rollouts_per_prompt
    prompt = median(len(row.prompt_ids) for row in job.rows)
    response = round(sum(len(row.response_ids) for row in job.rows) / len(job.rows))
    sequences = len(job.samples) * group
    student = readings([(row.prompt_ids, row.response_ids) for row in job.rows], job.metrics["update/tokens"])
    taught = [(row.teacher_prompt_ids, row.response_ids) for row in job.rows if row.teacher_prompt_ids is not None]
    teacher = readings(taught, job.metrics["score/tokens"])
    width = round(prompt + response)
    whole = round(max(r.tokens + r.cached for r in teacher))
    passes = calibrate(module, model, budget, max(budget // width, 1), width, width)
    scoring = calibrate(module, model, budget, max(budget // whole, 1), whole, whole)
    decoding = calibrate(module, model, sequences, sequences, 1, round(prompt + response / 2))
    answers = [
        Reading(1, len(rollout.response_ids) - 1, len(rollout.response_ids) - 1, prompt)
        for samples in job.samples for rollout in samples
    ]  # fmt: skip
    heads = Reading(1, 0, sum(len(row.response_ids) for row in job.rows))
    return {
        "generate": decoding.seconds(model, answers) + passes.seconds(model, [Reading(len(job.samples), prompt, 1)]),
        "score": scoring.seconds(model, teacher),
        "update": passes.seconds(model, [*student, heads], 3) + passes.seconds(model, [heads]),
    }


def check() -> tuple[list[str], list[list[str]]]:
    """Heading and rows: predicted over measured for each phase of several jobs."""
    torch.set_num_threads(1)
    vars(display)["time"] = SimpleNamespace(perf_counter=time.process_time, monotonic=time.monotonic)
    model = architecture_of(resolve_model_path("embedded:arithmetic"), None)
    assert model is not None
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as directory:
        endless = f"model.path={never_ending(Path(directory) / 'model')}"

        def of_length(length: int) -> list[str]:
            room = f"peers.max_context_tokens={2048 - length}"
            return [endless, f"rollout.max_response_tokens={length}", f"peers.max_peer_tokens={length}", room]

        jobs = {
            "mopd, 8 × 8": (["method=mopd"], False),
            "sdpo, 8 × 8": (["method=sdpo"], False),
            "mopd, 8 × 32": (["method=mopd", "rollout.num_rollouts_per_prompt=32"], False),
            "mopd, 8 × 8, 128 tokens": (of_length(128), True),
            "mopd, 8 × 8, 256 tokens": (of_length(256), True),
            "mopd, 8 × 8, 448 tokens": (of_length(448), True),
        }
        for name, (overrides, whole) in jobs.items():
            job = Job(CONFIG, overrides)
            steps = [job.step(1, whole) for _ in range(REPEATS + 1)][1:]
            for phase, predicted in predict(job, model).items():
                measured = median(step[phase] for step in steps)
                rows.append([name, phase, f"{predicted:.3f}", f"{measured:.3f}", f"{predicted / measured:.2f}"])
    return ["job", "phase", "predicted s", "measured s", "predicted / measured"], rows
