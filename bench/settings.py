"""A step of the local engine with some settings and without them: peak memory and seconds, on a CPU or a GPU.

    python -m bench.settings MODEL_DIR                                         # all weights against adapters of rank 16
    python -m bench.settings MODEL_DIR --against teacher.offload=true

Each side runs in processes of its own, in turns. A step is what `mopd train` does with a batch: responses are
drawn, scored by an EMA teacher that reads peers, and learned from; then the teacher follows. What is scored and learned
from has the same lengths on both sides. Seconds are CPU time on a CPU, so that other programs count little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.peak import Peak
from mopd_nemo.config import Config
from mopd_nemo.config.load import load_config
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.losses.objectives import Divergence
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import TrainExample

PHASES = ("generate", "score", "update", "teacher")
Ids = tuple[int, ...]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or embedded:arithmetic")
    parser.add_argument(
        "--against", nargs="+", default=["lora.rank=16"], metavar="KEY=VALUE", help="settings of the second side"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=6, help="of 64 tokens each")
    parser.add_argument("--rollouts", type=int, default=8, help="for each prompt")
    parser.add_argument("--tokens", type=int, default=56, help="of a response")
    parser.add_argument("--context", type=int, default=192, help="tokens of the teacher's prompt")
    parser.add_argument("--steps", type=int, default=3, help="timed in each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side, in turns")
    parser.add_argument("--micro-batch", type=int, default=2048, help="tokens in one pass of an update")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON here")
    parser.add_argument("--side", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def config_of(asked: argparse.Namespace, settings: Sequence[str]) -> Config:
    sizes = [
        f"model.path={asked.model}",
        f"model.dtype={asked.dtype}",
        f"model.device={asked.device}",
        f"rollout.max_response_tokens={asked.tokens}",
        f"rollout.num_rollouts_per_prompt={asked.rollouts}",
        "rollout.batch_size=192",
        "data.max_prompt_tokens=64",
        f"peers.max_context_tokens={asked.context}",
        f"train.tokens_per_micro_batch={asked.micro_batch}",
    ]
    return load_config(None, [*sizes, *settings])


def drawn(seed: int, count: int, size: int) -> Ids:
    """Token ids that no chat template means."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(size // 10, size, (count,), generator=generator).tolist())


def measure(asked: argparse.Namespace, settings: Sequence[str]) -> dict[str, float]:
    """Bytes at the peak of two steps, and seconds of each phase of the steps after them."""
    engine = LocalEngine(config_of(asked, settings))
    size = engine.student.module.config.vocab_size
    prompts = [drawn(number, 64, size) for number in range(asked.prompts)]
    rows = [
        TrainExample(
            group,
            rollout,
            prompt,
            drawn(1000 + group * asked.rollouts + rollout, asked.tokens, size),
            (-3.0,) * asked.tokens,
            drawn(100 + group, asked.context - 64, size) + prompt,
        )
        for group, prompt in enumerate(prompts)
        for rollout in range(asked.rollouts)
    ]
    batch = TrainBatch(rows, [LossTerm(Divergence(), tuple(range(len(rows))))])
    clock = time.process_time if asked.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def timed(phase: str, work: Callable[[], object]) -> object:
        started = clock()
        result = work()
        if asked.device != "cpu":
            torch.cuda.synchronize()
        seconds[phase].append(clock() - started)
        return result

    def step(number: int) -> None:
        sampling = Sampling(asked.tokens, 1.0)
        timed("generate", lambda: engine.generate(Request(prompts, asked.rollouts, sampling, str(number))))
        targets, _ = timed("score", lambda: engine.score(batch))  # type: ignore[misc]
        timed("update", lambda: engine.update(batch, targets, 1e-5))
        timed("teacher", engine.update_teacher)

    with Peak(asked.device) as peak:
        teacher = engine.teacher.model
        assert teacher is not None
        peak.hold([*engine.student.module.parameters(), *teacher.named_parameters().values()])
        for number in range(2):
            step(number)
    for values in seconds.values():
        values.clear()
    for number in range(asked.steps):
        step(2 + number)
    medians = {phase: statistics.median(values) for phase, values in seconds.items()}
    return {"bytes": peak.bytes, "step": sum(medians.values()), **medians}


def main() -> None:
    asked = arguments()
    if asked.side is not None:
        print(json.dumps(measure(asked, asked.side)))
        return
    other = " ".join(asked.against)
    sides: dict[str, list[dict[str, float]]] = {"all weights": [], other: []}
    for side in list(sides) * asked.rounds:
        settings = asked.against if side == other else []
        command = [sys.executable, "-m", "bench.settings", *sys.argv[1:], "--side", *settings]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        sides[side].append(json.loads(answer.stdout.splitlines()[-1]))
        print(side, sides[side][-1], file=sys.stderr)
    best = {side: {name: min(run[name] for run in runs) for name in runs[0]} for side, runs in sides.items()}
    full, low = best.values()
    print(f"| | all weights | {other} | ratio |\n|---|---|---|---|")
    for name, unit, divisor in (("bytes", "MB", 1e6), *((phase, "s", 1.0) for phase in ("step", *PHASES))):
        values = f"{full[name] / divisor:.2f} {unit} | {low[name] / divisor:.2f} {unit}"
        print(f"| {name} | {values} | {low[name] / full[name]:.2f} |")
    if asked.output is not None:
        asked.output.write_text(json.dumps({"settings": vars(asked) | {"output": None}, "sides": sides}, indent=1))


if __name__ == "__main__":
    main()
