"""A step of NeMo-RL's real Megatron worker on CPUs, by phase.

    python bench/nemo_step.py [--prompts 4] [--rollouts 8] [--prompt 64] [--context 512] [--response 128] [--k 100]
        [--ranks 1] [--batching packed] [--repeats 3] [--model DIR]

In the environment of `make test-nemo`, with its NEMO_RL_SOURCE. A step of mopd with an EMA teacher on the student's
top k, as `engine: nemo` makes it: the engine's own batches, dealt and packed by NeMo-RL, the worker's own methods, a
refit's export. Rollouts are random tokens. On `--ranks` data-parallel ranks, each a process with one thread; a phase
takes as long as the slowest. Sampling and verifying are not part of it. Medians over the repeats, after one that is not
counted.

What a phase is:
    driver          what the engine builds and takes apart: batches, targets of rows, weights
    serialisation   a rank's shards of the student's, the teacher's and the update's rows: into Ray's store and out
    student top-k   the student scores its own rows
    teacher         the EMA scores the teacher's rows
    of which EMA    what that took longer than the student on the same rows: weights put in and back
    EMA follows     the average moves
    update          the optimiser's state brought back, forward, backward and step
    refit           optimiser and gradients put away, the export of all weights, the model put away
    onload          the model brought back for scoring
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from mopd_nemo.engines.nemo.batches import score_batch, split_scores, train_batch
from mopd_nemo.losses.objectives import Divergence, token_weights
from mopd_nemo.types import TrainExample
from tests.integration.nemo.ranks import dealt, nemo_config, run_ranks, start

PHASES = (
    "driver",
    "serialisation",
    "student top-k",
    "teacher",
    "of which EMA",
    "EMA follows",
    "update",
    "refit",
    "onload",
)
SIZES = {"prompts": 4, "rollouts": 8, "prompt": 64, "context": 512, "response": 128, "k": 100, "ranks": 1, "repeats": 3}
STORE = 2 * 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batching", choices=["packed", "padded"], default="packed")
    parser.add_argument("--model", help="a Hugging Face model directory; default: the embedded one")
    arguments = parser.parse_args()
    found = run_ranks(measured, arguments.ranks, vars(arguments))
    slowest = {phase: max(rank[phase] for rank in found) for phase in PHASES}
    whole = sum(seconds for phase, seconds in slowest.items() if not phase.startswith("of which"))
    rows = arguments.prompts * arguments.rollouts
    print(
        f"{rows} rows: {arguments.prompt} + {arguments.response} tokens, the teacher's {arguments.context} + ", end=""
    )
    print(f"{arguments.response}; k {arguments.k}; {arguments.ranks} ranks, {arguments.batching}")
    print("| phase | seconds | of the step |\n|---|---|---|")
    for phase, seconds in slowest.items():
        print(f"| {phase} | {seconds:.3f} | {seconds / whole:.1%} |")
    print(f"| all | {whole:.3f} | |", flush=True)


def measured(sizes: dict[str, Any]) -> dict[str, float]:
    """Median seconds of each phase on this rank."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=STORE)
    worker = start(settings(sizes))
    worker.start_teacher(kind="ema", directory=None)
    steps = [one_step(worker, sizes, number) for number in range(sizes["repeats"] + 1)][1:]
    ray.shutdown()
    return {phase: median(step[phase] for step in steps) for phase in PHASES}


def settings(sizes: dict[str, Any]) -> Any:
    model = {"model": {"path": sizes["model"], "dtype": "float32"}} if sizes["model"] else {}
    longest = sizes["context"] + sizes["response"]
    return nemo_config(
        rollout={
            "num_prompts_per_step": sizes["prompts"],
            "num_rollouts_per_prompt": sizes["rollouts"],
            "max_response_tokens": sizes["response"],
        },
        data={"max_prompt_tokens": sizes["prompt"]},
        peers={"max_context_tokens": sizes["context"]},
        divergence={"k": sizes["k"]},
        train={"tokens_per_micro_batch": max(4 * longest, 2048)},
        nemo={"gpus_per_node": sizes["ranks"], "batching": sizes["batching"]},
        **model,
    )


def one_step(worker: Any, sizes: dict[str, Any], number: int) -> dict[str, float]:
    """Seconds of each phase of one step."""
    from mopd_nemo.engines.nemo.workers.loss import BatchLoss

    seconds = dict.fromkeys(PHASES, 0.0)
    rows = random_rows(sizes, number)
    own = [(row.prompt_ids, row.response_ids) for row in rows]
    read = [(row.teacher_prompt_ids or (), row.response_ids) for row in rows]
    with timed(seconds, "onload"):
        worker.prepare_for_lp_inference()
    student = scored(worker, seconds, "student top-k", own, None, sizes["k"])
    candidates = [target.ids_TK for target in student]
    targets = scored(worker, seconds, "teacher", read, candidates, sizes["k"], self_teacher=True)
    plain: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    scored(worker, plain, "teacher", read, candidates, sizes["k"])
    seconds["of which EMA"] = seconds["teacher"] - plain["teacher"]
    with timed(seconds, "driver"):
        lengths = [len(row.response_ids) for row in rows]
        weights = [
            torch.full((1, n), weight) for n, weight in zip(lengths, token_weights(lengths, "token_mean"), strict=True)
        ]
        batch = train_batch(rows, weights, targets, None, **padding(worker))
    data, _ = sent(worker, seconds, batch, len(batch["weights"]))
    loss = BatchLoss([Divergence(k=sizes["k"])], 2.0, len(worker.tokenizer), sizes["k"], student_support=True)
    with timed(seconds, "update"):
        worker.prepare_for_training()
        worker.set_learning_rate(rate=1e-6)
        worker.train(data, loss, gbs=len(batch["weights"]), mbs=1)
    with timed(seconds, "EMA follows"):
        worker.follow_student(rate=0.05)
    with timed(seconds, "refit"):
        worker.offload_before_refit()
        worker.exported()
        worker.offload_after_refit()
    return seconds


def scored(
    worker: Any,
    seconds: dict[str, float],
    phase: str,
    sequences: Any,
    candidates: Any,
    k: int,
    self_teacher: bool = False,
) -> Any:
    """Targets of all rows; where ranks share them, this rank's own stand for the others'."""
    with timed(seconds, "driver"):
        batch = score_batch(sequences, candidates, **padding(worker))
    data, order = sent(worker, seconds, batch, None)
    with timed(seconds, phase):
        found = worker.score_responses(
            data=data, k=k, vocab_size=len(worker.tokenizer), self_teacher=self_teacher, dtype="float32"
        )
    lengths = [len(response) for _, response in sequences]
    count = sum(lengths[i] for i in order)
    repeats = -(-count // len(found["ids"]))
    whole = {name: np.concatenate([part] * repeats)[:count] for name, part in found.items()}
    with timed(seconds, "driver"):
        return split_scores([whole], order, lengths)


def sent(worker: Any, seconds: dict[str, float], batch: dict[str, Any], size: int | None) -> tuple[Any, list[int]]:
    """This rank's share, after a way through Ray's object store; and the order of all rows."""
    import ray

    with timed(seconds, "driver"):
        data, order = dealt(worker, batch, worker.cfg["sequence_packing"]["train_mb_tokens"], size)
    with timed(seconds, "serialisation"):
        return ray.get(ray.put(data)), order


def padding(worker: Any) -> dict[str, int]:
    from megatron.core import parallel_state

    return {
        "pad_id": 0,
        "length_multiple": worker.cfg["make_sequence_length_divisible_by"],
        "count_multiple": parallel_state.get_data_parallel_world_size(),
    }


def random_rows(sizes: dict[str, Any], number: int) -> list[TrainExample]:
    draw = np.random.default_rng(number)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(3, 428, count).tolist())

    rows = []
    for group in range(sizes["prompts"]):
        prompt, context = ids(sizes["prompt"]), ids(sizes["context"])
        for rollout in range(sizes["rollouts"]):
            response = ids(int(draw.integers(sizes["response"] // 2, sizes["response"] + 1)))
            rows.append(TrainExample(group, rollout, prompt, response, (-6.0,) * len(response), context))
    return rows


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - started


if __name__ == "__main__":
    main()
