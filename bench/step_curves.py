"""Cost of a MOPD step against rollouts a prompt and response length, through the engine's own verbs.

Both curves use the embedded model. Every second response counts as correct, without verification, so that the fraction
of rollouts with a signal is the same at every point. For response length the end token is one that the model never
writes, so every response has exactly `rollout.max_response_tokens`. A peer may have as many tokens, so the context
grows along with the response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from mopd_nemo.analysis.plots import COLOURS, MARKERS, SOFT, style_axes
from mopd_nemo.chat import with_prompt_ids
from mopd_nemo.config.load import load_config
from mopd_nemo.data.load import load_problems, problems_of_step
from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.local.model import load_model
from mopd_nemo.engines.models import load_tokenizer
from mopd_nemo.methods.base import make_method
from mopd_nemo.run.display import PhaseTimer
from mopd_nemo.types import Outcome, Rollout, RolloutGroup, TrainExample, Verdict

PROMPTS, ROLLOUTS = 8, 8
ROLLOUT_POINTS, LENGTH_POINTS = (4, 8, 16, 32), (32, 64, 128, 256, 448)
PHASES = ("generate", "context", "score", "update")
SHOWN = ("step", "generate", "score", "update")
Points = dict[int, dict[str, float]]
"""Per point, median seconds of each phase and of the step."""


class Job:
    """One point of a curve."""

    def __init__(self, config_file: Path, overrides: Sequence[str]) -> None:
        settings = [f"rollout.num_prompts_per_step={PROMPTS}", "optimizer.learning_rate=1e-12", *overrides]
        self.config = load_config(config_file, settings)
        self.engine = LocalEngine(self.config)
        self.method = make_method(self.config, self.engine.chat)
        problems = load_problems(self.config, "train")
        self.problems = with_prompt_ids(problems, self.engine.chat, self.config.data.max_prompt_tokens)
        self.rows: list[TrainExample] = []
        self.samples: list[list[Rollout]] = []
        self.metrics: dict[str, float] = {}
        """Of the last step."""

    def step(self, number: int, whole: bool) -> dict[str, float]:
        """Seconds of a step, by the clock that `mopd_nemo.run.display` has.

        Args:
            whole: every response must have the length that was asked for.
        """
        engine, rollout = self.engine, self.config.rollout
        problems = problems_of_step(self.problems, number, PROMPTS, self.config.seed)
        prompts = [problem.prompt_ids for problem in problems]
        timer = PhaseTimer()
        with timer("generate"):
            sampling = Sampling(rollout.max_response_tokens)
            samples = engine.generate(Request(prompts, rollout.num_rollouts_per_prompt, sampling, f"curve/{number}"))
        if whole:
            assert all(len(r.response_ids) == rollout.max_response_tokens for group in samples for r in group)
        right, wrong = Verdict(1.0, Outcome.CORRECT, success=True), Verdict(0.0, Outcome.WRONG, success=False)
        verdicts = [right if s % 2 else wrong for s in range(rollout.num_rollouts_per_prompt)]
        with timer("context"):
            groups = [
                RolloutGroup(problem, tuple(group), tuple(verdicts))
                for problem, group in zip(problems, samples, strict=True)
            ]
            batch = self.method.build(groups, number)
        with timer("score"):
            targets, _ = engine.score(batch)
        with timer("update"):
            self.metrics = engine.update(batch, targets, 1e-12)
            engine.update_teacher()
        self.rows, self.samples = batch.examples, samples
        seconds = timer.metrics()
        return {name: seconds[f"seconds/{name}"] for name in (*PHASES, "step")}


def never_ending(directory: Path) -> Path:
    """The embedded model with an end token that it has never seen."""
    import torch

    tokenizer = load_tokenizer("embedded:arithmetic", key="model.path")
    kinds = {"dtype": torch.float32, "weights": torch.float32, "device": torch.device("cpu")}
    model = load_model("embedded:arithmetic", key="model.path", **kinds).module
    tokenizer.eos_token = tokenizer.pad_token
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.pad_token_id
    for part in (model, tokenizer):
        part.save_pretrained(directory)
    return directory


def measure(jobs: dict[int, Job], repeats: int, whole: bool) -> Points:
    """All points take turns. The first step of each is not counted."""
    found: dict[int, list[dict[str, float]]] = {point: [] for point in jobs}
    for number in range(1, repeats + 2):
        for point, job in jobs.items():
            found[point].append(job.step(number, whole))
    return {
        point: {name: median(step[name] for step in steps[1:]) for name in steps[0]} for point, steps in found.items()
    }


def exponent(points: Points, name: str) -> float:
    """Slope of log seconds against log size, by least squares."""
    return float(np.polyfit([math.log(p) for p in points], [math.log(v[name]) for v in points.values()], 1)[0])


def line(points: Points, name: str) -> tuple[float, float, float]:
    """Seconds = fixed + each·size by least squares: (fixed, each, R²)."""
    x, y = np.array([*points], float), np.array([v[name] for v in points.values()])
    each, fixed = np.polyfit(x, y, 1)
    residual = y - (fixed + each * x)
    return float(fixed), float(each), 1 - float((residual**2).sum() / ((y - y.mean()) ** 2).sum())


def show(title: str, points: Points) -> None:
    print(f"\n| {title} | {' | '.join(f'{name}, s' for name in (*PHASES, 'step'))} |\n|---|{'---|' * 5}")
    for point, seconds in points.items():
        print(f"| {point} | {' | '.join(f'{seconds[name]:.3f}' for name in (*PHASES, 'step'))} |")
    print(f"| exponent | {' | '.join(f'{exponent(points, name):.2f}' for name in (*PHASES, 'step'))} |")
    fixed, each, fit = line(points, "step")
    print(f"\nstep = {fixed:.3f} s + {1000 * each:.2f} ms × {title}, R² {fit:.4f}", flush=True)


def plot(panels: dict[str, Points], stem: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.3), layout="constrained")
    for axes, (title, points) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        style_axes(axes, title, "seconds a step")
        for name, colour, marker in zip(SHOWN, COLOURS, MARKERS, strict=False):
            label = f"{name}, exponent {exponent(points, name):.2f}"
            axes.plot([*points], [v[name] for v in points.values()], marker, color=colour, label=label, markersize=5)
        fixed, each, fit = line(points, "step")
        ends = np.array([0, max(points)])
        axes.plot(ends, fixed + each * ends, "--", color=SOFT, lw=1, label=f"line through step, R² {fit:.3f}")
        axes.set_xlim(0)
        axes.set_ylim(0)
        axes.set_xticks([*points][1:] if len(points) > 4 else [*points])
        axes.legend(fontsize=7.5, frameon=False)
    figure.savefig(stem.with_name(stem.name + ".png"), dpi=200)


def curves(config_file: Path, directory: Path, repeats: int, stem: Path) -> None:
    """Measure, print and plot both."""
    rollouts = {n: Job(config_file, [f"rollout.num_rollouts_per_prompt={n}"]) for n in ROLLOUT_POINTS}
    model = never_ending(directory / "never-ending")
    lengths = {
        r: Job(
            config_file,
            [
                f"model.path={model}",
                f"rollout.num_rollouts_per_prompt={ROLLOUTS}",
                f"rollout.max_response_tokens={r}",
                f"peers.max_peer_tokens={r}",
                f"peers.max_context_tokens={2048 - r}",
            ],
        )
        for r in LENGTH_POINTS
    }
    panels = {
        "rollouts a prompt": measure(rollouts, repeats, whole=False),
        "tokens a response": measure(lengths, repeats, whole=True),
    }
    for title, points in panels.items():
        show(title, points)
    plot(panels, stem)
