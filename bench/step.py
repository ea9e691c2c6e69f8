"""Seconds of a training step by phase and method, beside TRL's trainers on the same work.

    python bench/step.py --rounds 8                           # mopd, sdpo, grpo
    python bench/step.py --rounds 8 --peer-python trl-env/bin/python    # and TRL's SDPO and on-policy distillation
    python bench/step.py --config configs/real/smollm2.yaml --peer-python …   # on the model of `make real`
    python bench/step.py --curves docs/results/step-curves    # cost against rollouts and response length

All sides run the job of a config in float32, by default the quickstart's (the embedded model, 16 prompts × 8 rollouts,
at most 96 tokens, temperature 1, one update a step), in turns: a round is a few steps of each, in an order that
rotates, and the first step of every round is not counted, nor are set-up, checkpoints and evaluation. The learning rate
is so small that no weight moves: every method answers step s with the same rollouts, and a step of one method is
compared with the same step of another. What a ratio shows is the median over those pairs; seconds are medians over
steps.

With one thread, seconds are those that the process itself computes, which other programs on the machine change little;
with several they are wall-clock time.

Ours is the trainer itself, and its own `metrics.jsonl`. The teacher's tokens of a naive implementation are those of
every row's own context and response, without any padding. TRL runs in its own environment (bench/step_trl.py says how
to make it) with what is fastest there on a CPU: no gradient checkpointing, and the best of several micro-batch sizes,
which are tried first. Its prompts are the same; its sampler draws others, so its responses differ a little in length.
`--memory` adds the peak of the resident memory of each side's own process, alone for two steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.step_curves import curves
from mopd_nemo.config import Config
from mopd_nemo.config.load import load_config
from mopd_nemo.data.load import load_problems, problems_of_step
from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.files import read_rows
from mopd_nemo.run import display
from mopd_nemo.run.directory import RunDirectory
from mopd_nemo.run.display import PHASES
from mopd_nemo.trainer import Trainer

ROOT = Path(__file__).parent.parent
LEARNING_RATE = 1e-12
METHODS = ("mopd", "sdpo", "grpo")
TRAINERS = {"TRL SDPO": "sdpo", "TRL distillation": "distillation"}
MICRO_BATCHES = (128, 32, 16, 8)
EXTRA = {"opd": ["teacher.kind=frozen", "divergence.support=full"]}
"""What TRL's distillation does."""
Row = dict[str, float]


class Ours:
    """One method's run, continued from its checkpoint in every round."""

    def __init__(self, config: Path, method: str, directory: Path, overrides: Sequence[str]) -> None:
        fixed = [
            f"method={method}",
            f"run_dir={directory / method}",
            f"optimizer.learning_rate={LEARNING_RATE}",
            "model.dtype=float32",
            "train.eval_every=0",
            "train.checkpoint_every=1000000",
            "logging.save_rollouts_every=0",
        ]
        if load_config(config).data.num_train:  # generated problems: as many as no run uses up
            fixed.append("data.num_train=4096")
        self.config = load_config(config, [*fixed, *overrides])
        self.run = RunDirectory(directory / method)
        self.done = 0

    def round(self, steps: int) -> list[Row]:
        with (self.run.path.parent / "console.txt").open("a") as file:
            console, last = Console(file=file), f"train.num_steps={self.done + steps}"
            if self.done:
                trainer = Trainer.resumed(RunDirectory.open(self.run.path), [last], console)
            else:
                config = self.config.model_copy(
                    update={"train": self.config.train.model_copy(update={"num_steps": steps})}
                )
                trainer = Trainer.new(config, console)
            trainer.fit()
        rows = read_rows(self.run.metrics_file)[self.done :]
        self.done += steps
        return [row | {"seconds": row["seconds/step"], "tokens": tokens_of(row)} for row in rows]


class Trl:
    """A trainer of TRL in its own environment, a step for each line it is sent."""

    def __init__(
        self, trainer: str, python: str, config: Config, num_steps: int, micro_batch: int, clock: str, directory: Path
    ) -> None:
        folder = directory / f"trl-{trainer}-{micro_batch}"
        folder.mkdir()
        rollout = config.rollout
        problems = load_problems(config, "train")
        count = rollout.num_prompts_per_step
        ordered = [
            problem for step in range(num_steps) for problem in problems_of_step(problems, step + 1, count, config.seed)
        ]
        job = {
            "trainer": trainer,
            "model": resolve_model_path(config.model.path),
            "problems": [{"messages": list(p.messages), "answer": json.dumps(p.answer)} for p in ordered],
            "num_prompts": count,
            "num_rollouts": rollout.num_rollouts_per_prompt,
            "max_response_tokens": rollout.max_response_tokens,
            "micro_batch": micro_batch,
            "num_steps": num_steps,
            "learning_rate": LEARNING_RATE,
            "clock": clock,
            "threads": torch.get_num_threads(),
        }
        (folder / "job.json").write_text(json.dumps(job))
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(ROOT / "bench/step_trl.py"), str(folder / "job.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def round(self, steps: int) -> list[Row]:
        return [self._step() for _ in range(steps)]

    def _step(self) -> Row:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"TRL has ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def tokens_of(row: Row) -> float:
    return row["tokens_per_second"] * row["seconds/step"]


@contextlib.contextmanager
def fastest_trl(
    name: str, arguments: argparse.Namespace, config: Config, num_steps: int, directory: Path
) -> Iterator[Trl]:
    """The trainer with the micro-batch size that is fastest here: every size takes three steps, two of them counted."""
    found: dict[int, float] = {}
    rows = config.rollout.num_prompts_per_step * config.rollout.num_rollouts_per_prompt
    sizes = [size for size in arguments.micro_batches if rows % size == 0]
    for size in sizes if len(sizes) > 1 else []:
        trial = Trl(TRAINERS[name], arguments.peer_python, config, 3, size, arguments.clock, directory)
        found[size] = min(row["seconds"] for row in trial.round(3)[1:])
        trial.close()
    best = min(sizes, key=lambda size: found.get(size, 0.0))
    tried = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in found.items())
    print(f"{name}: micro-batches of {best} sequences ({tried or 'the only size'})", flush=True)
    folder = directory / "chosen"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = Trl(TRAINERS[name], arguments.peer_python, config, num_steps, best, arguments.clock, folder)
    try:
        yield chosen
    finally:
        chosen.close()


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, list[Row]]:
    """Counted steps of each side, in order."""
    names = [*arguments.methods, *(["opd"] if arguments.peer_python else [])]
    sides: dict[str, Ours | Trl] = {
        name: Ours(arguments.config, name, directory, [*arguments.overrides, *EXTRA.get(name, [])]) for name in names
    }
    config = next(side.config for side in sides.values() if isinstance(side, Ours))
    with contextlib.ExitStack() as stack:
        if arguments.peer_python:
            for name in TRAINERS:
                num_steps = arguments.rounds * arguments.steps
                trainer = fastest_trl(name, arguments, config, num_steps, directory)
                sides[name] = stack.enter_context(trainer)
        found: dict[str, list[Row]] = {name: [] for name in sides}
        for number in range(arguments.rounds):
            order = [*sides][number % len(sides) :] + [*sides][: number % len(sides)]
            for name in order:
                found[name] += sides[name].round(arguments.steps)[1:]
            shown = ", ".join(f"{name} {rows[-1]['seconds']:.2f}" for name, rows in found.items())
            print(f"round {number + 1}: {shown}", file=sys.stderr, flush=True)
    return found


def peaks(arguments: argparse.Namespace, config: Config, sides: Sequence[str], directory: Path) -> dict[str, float]:
    """GiB of resident memory at the most, of each side's own process, which does two steps and nothing else."""
    found = {}
    for name in sides:
        if name in TRAINERS:
            with fastest_trl(name, arguments, config, 2, directory / f"memory {name}") as trainer:
                found[name] = trainer.round(2)[-1]["peak_gib"]
            continue
        ours = Ours(arguments.config, name, directory / "memory", [*arguments.overrides, *EXTRA.get(name, [])])
        fields = ours.config.model_dump(mode="json", exclude_defaults=True)
        file = directory / "memory" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(fields))
        command = [sys.executable, "-m", "mopd_nemo", "train", "-c", str(file), "train.num_steps=2"]
        with (directory / "memory" / f"{name}.txt").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(Path(log.name).read_text()[-3000:])
        found[name] = usage.ru_maxrss / 2**20
    return found


def ratio(a: Sequence[Row], b: Sequence[Row], key: str = "seconds") -> tuple[float, float, float]:
    """Median of a over b, step by step, and the quartiles."""
    pairs = sorted(x[key] / y[key] for x, y in zip(a, b, strict=True))
    return median(pairs), pairs[len(pairs) // 4], pairs[-1 - len(pairs) // 4]


def middle(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return median(values) if values else None


def show(found: dict[str, list[Row]]) -> None:
    ours = [name for name in found if name not in TRAINERS]
    print(f"\n| | {' | '.join(ours)} |\n|---|{'---|' * len(ours)}")

    def line(title: str, key: str, form: str = "{:.3f}", scale: float = 1.0) -> None:
        values = [middle(found[name], key) for name in ours]
        print(f"| {title} | {' | '.join('' if v is None else form.format(v * scale) for v in values)} |")

    for phase in PHASES:
        line(f"{phase}, s", f"seconds/{phase}")
    line("**step**, s", "seconds")
    line("response tokens", "tokens", "{:,.0f}")
    line("response tokens a second", "tokens_per_second", "{:,.0f}")
    line("rollouts learned from", "signal", "{:.1f} %", 100)
    line("context tokens", "context/tokens", "{:.0f}")
    line("teacher's tokens, computed", "score/tokens", "{:,.0f}")
    line("teacher's tokens, naive", "score/tokens_alone", "{:,.0f}")
    line("padding, score", "score/padding", "{:.1f} %", 100)
    line("padding, update", "update/padding", "{:.1f} %", 100)
    print("\n| step against step | ratio | quartiles |\n|---|---|---|")
    for a, b in (("mopd", "sdpo"), ("mopd", "grpo"), ("sdpo", "grpo")):
        if a in found and b in found:
            print_ratio(f"{a} / {b}", ratio(found[a], found[b]))
    if any(name in found for name in TRAINERS):
        show_trl(found)


def show_trl(found: dict[str, list[Row]]) -> None:
    print("\n| TRL | seconds | response tokens | rollouts learned from | tokens a second |\n|---|---|---|---|---|")
    for name in found:
        rows = found[name]
        values = [median(row[key] for row in rows) for key in ("seconds", "tokens", "signal")]
        rate = median(row["tokens"] / row["seconds"] for row in rows)
        print(f"| {name} | {values[0]:.3f} | {values[1]:,.0f} | {values[2]:.1%} | {rate:,.0f} |")
    print("\n| per step | ratio | quartiles |\n|---|---|---|")
    for name, own in (("TRL SDPO", "mopd"), ("TRL SDPO", "sdpo"), ("TRL distillation", "mopd"),
                      ("TRL distillation", "opd")):  # fmt: skip
        if own in found:
            print_ratio(f"{name} / {own}", ratio(found[name], found[own]))


def print_ratio(title: str, found: tuple[float, float, float]) -> None:
    print(f"| {title} | {found[0]:.2f} | {found[1]:.2f} to {found[2]:.2f} |")


def check_same_rollouts(found: dict[str, list[Row]]) -> None:
    """Every method of ours must have answered every step with the same rollouts, or the pairs are none."""
    ours = [name for name in found if name not in TRAINERS]
    for rows in zip(*(found[name] for name in ours), strict=True):
        seen = {(row["step"], row["response/tokens"], row["reward"]) for row in rows}
        if len(seen) != 1:
            sys.exit(f"the methods' rollouts differ: {dict(zip(ours, rows, strict=True))}")


def describe(arguments: argparse.Namespace) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    threads = f"{torch.get_num_threads()} threads ({arguments.clock}), torch {torch.__version__}"
    counted = f"{arguments.rounds * (arguments.steps - 1)} of {arguments.rounds * arguments.steps} steps counted"
    if arguments.curves:
        counted = f"median of {arguments.repeats} steps a point"
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    return f"{model}, {os.cpu_count()} cores, {threads}, {load}\nbench/step.py {' '.join(sys.argv[1:])}: {counted}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings of our side, key=value")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml", help="the job of all sides")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="of a round; the first is not counted")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    parser.add_argument("--peer-python", help="interpreter of an environment with TRL")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=list(MICRO_BATCHES), help="that TRL may take")
    parser.add_argument("--memory", action="store_true", help="measure each side's peak memory too")
    parser.add_argument("--curves", type=Path, metavar="STEM", help="instead measure the curves, and write STEM.png")
    parser.add_argument("--repeats", type=int, default=5, help="of every point of a curve")
    arguments: Any = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.clock = "process_time" if arguments.threads == 1 else "perf_counter"
    clock = getattr(time, arguments.clock)
    # what the trainer times its phases with
    vars(display)["time"] = SimpleNamespace(perf_counter=clock, monotonic=time.monotonic)
    print(describe(arguments), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as directory:
        if arguments.curves:
            curves(ROOT / "configs/quickstart.yaml", Path(directory), arguments.repeats, arguments.curves)
            return
        found = measure(arguments, Path(directory))
        check_same_rollouts(found)
        show(found)
        if arguments.memory:
            print("\n| peak resident memory, alone | GiB |\n|---|---|")
            for name, gib in peaks(arguments, load_config(arguments.config), [*found], Path(directory)).items():
                print(f"| {name} | {gib:.2f} |")


if __name__ == "__main__":
    main()
