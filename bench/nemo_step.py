"""A step of NeMo-RL's real Megatron worker on CPUs, by phase.

    PYTHONPATH=nemo-rl python bench/nemo_step.py [--prompts 4] [--rollouts 8] [--prompt 64] [--context 512]
        [--response 128] [--k 100] [--ranks 1] [--batching packed] [--targets workers] [--repeats 3] [--width 0]
        [--layers 4]

In the environment of `make test-nemo`; `nemo-rl` is a checkout of NeMo-RL. A step of mopd with an EMA teacher on the
student's top k, as `engine: nemo` makes it: the engine's own batches and deal, NeMo-RL's packer, the worker's own
methods, a refit's export. Rollouts are random tokens of the embedded tokenizer. The model is the embedded one, whose
weights are few; `--width` makes a Qwen3 of that width, with random weights. On `--ranks` data-parallel ranks, each a
process with one thread; a phase takes as long as the slowest. Sampling and verifying are not part of it. Medians over
the repeats, after one that is not counted. `--targets driver` sends targets through the driver, as for an external
teacher with several updates a step; by default they stay in the workers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from mopd_nemo.engines.models import load_tokenizer
from mopd_nemo.engines.nemo.batches import score_batch, split_scores, train_batch
from mopd_nemo.engines.nemo.dealing import deal, dealt, lanes
from mopd_nemo.losses.logits import TopK
from mopd_nemo.losses.objectives import Divergence, token_weights
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import TrainExample
from tests.conftest import EMBEDDED
from tests.integration.nemo.ranks import nemo_config, run_ranks, start

PHASES = {
    "onload": "the model comes back for scoring",
    "driver": "batches, targets of rows and weights are made and taken apart",
    "serialisation": "a rank's rows, for the student, the teacher and the update, into Ray's store and out of it",
    "student's top k": "the student scores its own rows",
    "EMA in and out": "the teacher's weights take the student's place, which gets its own back",
    "teacher": "scores of the teacher's rows, without the line above",
    "update": "the optimiser's state comes back; forward, backward, step",
    "EMA follows": "the average moves",
    "refit": "optimiser and gradients go, all weights are exported, the model goes",
}
STORE = 2 * 2**30


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Print the table; the seconds of each phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"prompts": 4, "rollouts": 8, "prompt": 64, "context": 512, "response": 128, "k": 100}
    for name, value in {**sizes, "ranks": 1, "repeats": 3, "width": 0, "layers": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--batching", choices=["packed", "padded"], default="packed")
    parser.add_argument("--targets", choices=["workers", "driver"], default="workers")
    own = parser.parse_args(arguments)
    if own.prompts * own.rollouts % own.ranks:
        parser.error(f"--ranks {own.ranks} does not divide {own.prompts * own.rollouts} rows")
    with TemporaryDirectory() as made:
        os.environ.setdefault("NRL_MEGATRON_CHECKPOINT_DIR", f"{made}/megatron")
        model = wide_model(Path(made) / "model", own.width, own.layers) if own.width else EMBEDDED
        found = run_ranks(measured, own.ranks, vars(own) | {"model": str(model)})
    slowest = {phase: max(seconds[phase] for seconds, _ in found) for phase in (*PHASES, "MB")}
    whole, weights = sum(slowest[phase] for phase in PHASES), found[0][1] / 1e6
    print(
        f"{own.prompts * own.rollouts} rows of {own.prompt} + up to {own.response} tokens, the teacher's of "
        f"{own.context} + {own.response}; k {own.k}; {weights:.1f} M weights, {own.ranks} ranks, {own.batching}; "
        f"targets: {own.targets}; through Ray's store: {slowest['MB']:.3f} MB a rank"
    )
    print("| phase | seconds | of the step | |\n|---|---|---|---|")
    for phase, what in PHASES.items():
        print(f"| {phase} | {slowest[phase]:.3f} | {slowest[phase] / whole:.1%} | {what} |")
    print(f"| all | {whole:.3f} | | |", flush=True)
    return slowest


def wide_model(directory: Path, width: int, layers: int) -> Path:
    """A Qwen3 with random weights and the embedded tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config.from_pretrained(
        EMBEDDED,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        layer_types=["full_attention"] * layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    load_tokenizer(str(EMBEDDED), key="--model").save_pretrained(directory)
    return directory


def measured(sizes: dict[str, Any]) -> tuple[dict[str, float], int]:
    """Median seconds of each phase on this rank; and the model's weights."""
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=STORE)
    worker = start(settings(sizes))
    worker.start_teacher(kind="ema", directory=None)
    steps = [one_step(worker, sizes, number) for number in range(sizes["repeats"] + 1)][1:]
    ray.shutdown()
    worker.prepare_for_lp_inference()
    weights = sum(weight.numel() for weight in worker.model.parameters())
    return {name: median(step[name] for step in steps) for name in (*PHASES, "MB")}, weights


def settings(sizes: dict[str, Any]) -> Any:
    longest = sizes["context"] + sizes["response"]
    return nemo_config(
        model={"path": sizes["model"]},
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
    )


def one_step(worker: Any, sizes: dict[str, Any], number: int) -> dict[str, float]:
    """Seconds of each phase of one step, and `MB` sent."""
    from mopd_nemo.engines.nemo.workers.loss import BatchLoss

    seconds = dict.fromkeys((*PHASES, "MB"), 0.0)
    rows = random_rows(sizes, number)
    with timed(seconds, "onload"):
        worker.prepare_for_lp_inference()
    with timed(seconds, "EMA in and out"), worker._self_teacher_inside():
        pass
    targets, keys, order = taught(worker, sizes, seconds, rows)
    with timed(seconds, "driver"):
        lengths = [len(row.response_ids) for row in rows]
        each = token_weights(lengths, "token_mean")
        weights = [torch.full((1, length), weight) for length, weight in zip(lengths, each, strict=True)]
        batch = train_batch(rows, weights, targets, None, **padding(worker, rows, order), keys=keys)
    data, _ = sent(worker, seconds, batch, order, "train_mb_tokens")
    loss = BatchLoss([Divergence(k=sizes["k"])], 2.0, len(worker.tokenizer), watch=sizes["k"], student_support=True)
    with timed(seconds, "update"):
        worker.prepare_for_training()
        worker.set_learning_rate(rate=1e-6)
        worker.train(data, loss, gbs=len(order), mbs=1)
        worker.forget_targets()
    with timed(seconds, "EMA follows"):
        worker.follow_student(rate=0.05)
    with timed(seconds, "refit"):
        worker.offload_before_refit()
        worker.exported()
        worker.offload_after_refit()
    return seconds


def taught(
    worker: Any, sizes: dict[str, Any], seconds: dict[str, float], rows: Sequence[TrainExample]
) -> tuple[list[TopK | None], list[int] | None, list[int]]:
    """Targets of the rows, or the keys by which workers keep them; and the order in which rows are dealt.

    The student's weights score: what an EMA adds is measured apart, where nothing else varies.
    """
    with timed(seconds, "driver"):
        batch = TrainBatch(list(rows), [LossTerm(Divergence(k=sizes["k"]), tuple(range(len(rows))))])
        rank_of = deal(rows, batch.updates(1), sizes["ranks"], packed=sizes["batching"] == "packed")
        order = lanes(rank_of, sizes["ranks"])
    read = [(row.teacher_prompt_ids or (), row.response_ids) for row in rows]
    if sizes["targets"] == "workers":
        keys = list(range(len(rows)))
        with timed(seconds, "driver"):
            scored_rows = score_batch(read, None, **padding(worker, rows, order), keys=keys)
        data, _ = sent(worker, seconds, scored_rows, order, "logprob_mb_tokens")
        own = {"k": sizes["k"], "vocab_size": len(worker.tokenizer), "self_teacher": False, "dtype": "float32"}
        with timed(seconds, "teacher"):
            worker.keep_targets(data=data, role="teacher", hidden=True, contrast=(0.0, True), **own)
        return [None] * len(rows), keys, order
    candidates: list[Any] | None = None
    found: list[TopK] = []
    prompts = [(row.prompt_ids, row.response_ids) for row in rows]
    for phase, sequences in (("student's top k", prompts), ("teacher", read)):
        found = scored(worker, seconds, phase, sequences, candidates, sizes["k"], order)
        candidates = [target.ids_TK for target in found]
    return list(found), None, order


def scored(
    worker: Any,
    seconds: dict[str, float],
    phase: str,
    sequences: Sequence[tuple[Any, Any]],
    candidates: list[Any] | None,
    k: int,
    order: list[int],
) -> list[TopK]:
    """Targets of all rows; where ranks share them, this rank's own stand for the others'."""
    with timed(seconds, "driver"):
        batch = score_batch(sequences, candidates, **padding(worker, sequences, order))
    data, numbers = sent(worker, seconds, batch, order, "logprob_mb_tokens")
    vocab_size = len(worker.tokenizer)
    with timed(seconds, phase):
        found = worker.score_responses(data=data, k=k, vocab_size=vocab_size, self_teacher=False, dtype="float32")
    seconds["MB"] += sum(part.nbytes for part in found.values()) / 1e6
    lengths = [len(response) for _, response in sequences]
    count = sum(lengths[i] if i < len(lengths) else 1 for i in numbers)
    repeats = -(-count // len(found["ids"]))
    whole = {name: np.concatenate([part] * repeats)[:count] for name, part in found.items()}
    with timed(seconds, "driver"):
        return split_scores([whole], numbers, lengths)


def sent(
    worker: Any, seconds: dict[str, float], batch: dict[str, Any], order: list[int], budget: str
) -> tuple[Any, list[int]]:
    """This rank's share, after a way through Ray's object store; and the numbers of all rows, rank by rank."""
    import ray
    from megatron.core import parallel_state

    ranks = parallel_state.get_data_parallel_world_size()
    packing = {
        "algorithm": "modified_first_fit_decreasing",
        "input_key": "input_ids",
        "input_lengths_key": "input_lengths",
        "sequence_length_pad_multiple": worker.cfg["make_sequence_length_divisible_by"],
        "max_tokens_per_microbatch": worker.cfg["sequence_packing"].get(budget),
    }
    with timed(seconds, "driver"):
        data: Any = dealt(batch, order)
        if worker.cfg["sequence_packing"]["enabled"]:
            shares, positions = data.shard_by_batch_size(ranks, sequence_packing_args=packing)
        else:
            shares, positions = data.shard_by_batch_size(ranks), list(range(len(order)))
        own = shares[parallel_state.get_data_parallel_rank()]
    seconds["MB"] += len(ray.cloudpickle.dumps(own)) / 1e6
    with timed(seconds, "serialisation"):
        return ray.get(ray.put(own)), [order[position] for position in positions]


def padding(worker: Any, rows: Sequence[Any], order: Sequence[int]) -> dict[str, Any]:
    multiple = worker.cfg["make_sequence_length_divisible_by"]
    return {"pad_id": 0, "length_multiple": multiple, "filler": len(order) - len(rows)}


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
