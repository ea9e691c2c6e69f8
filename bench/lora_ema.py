"""The quickstart with adapters: what it learns, and how far an EMA of adapters is from an EMA of merged weights.

    python -m bench.lora_ema --rank 16 --learning-rate 1e-3

The teacher's change is the product of the averages of B and A. Beside the run, the average of the products is kept. The
difference is given as a share of that average's distance from the base, and as the mean KL divergence of the two
teachers' next tokens on held-out prompts, beside that of the average from the base.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from mopd_nemo.config.load import load_config
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.trainer import Trainer

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
Weights = dict[str, Tensor]


class Watched:
    """An engine whose merged weights are averaged beside its teacher."""

    def __init__(self, engine: LocalEngine, rate: float) -> None:
        self._engine, self._rate, self._follow = engine, rate, engine.update_teacher
        self.average: Weights = {name: weights.double().clone() for name, weights in engine.student.sampled_weights()}
        engine.update_teacher = self.update_teacher  # type: ignore[method-assign]

    def update_teacher(self) -> None:
        self._follow()
        for name, weights in self._engine.student.sampled_weights():
            self.average[name].lerp_(weights.double(), self._rate)


def distance(a: Weights, b: Weights) -> float:
    return sum((a[name].double() - b[name].double()).square().sum().item() for name in a) ** 0.5


@torch.no_grad()
def logprobs(engine: LocalEngine, weights: Weights, prompts: list[tuple[int, ...]]) -> Tensor:
    module = copy.deepcopy(engine.student.initial().module)
    module.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    logits = [module(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]
    return torch.cat(logits).double().log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> float:
    return (p.exp() * (p - q)).sum(-1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("overrides", nargs="*", help="settings of the quickstart, as key=value")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        settings = [
            f"lora.rank={asked.rank}",
            f"optimizer.learning_rate={asked.learning_rate}",
            f"run_dir={scratch}/run",
        ]
        trainer = Trainer.new(load_config(QUICKSTART, [*settings, *asked.overrides]), Console(stderr=True))
        engine = trainer.engine
        assert isinstance(engine, LocalEngine)
        base = {name: weights.clone() for name, weights in engine.student.sampled_weights()}
        watched = Watched(engine, trainer.config.teacher.ema_rate)
        trainer.fit()
        evaluations = trainer.run.rows(trainer.run.eval_file)
    assert engine.teacher.model is not None
    teacher = {name: weights.clone() for name, weights in engine.teacher.model.sampled_weights()}
    whole = distance(watched.average, base)
    print(f"difference of the two averages: {distance(watched.average, teacher) / whole:.3f} of the average's change")
    prompts = [problem.prompt_ids for problem in trainer.eval_problems[:64]]
    average, own, start = (logprobs(engine, weights, prompts) for weights in (watched.average, teacher, base))
    print(f"KL(average of products, product of averages) = {divergence(average, own):.2e} nats a token;", end=" ")
    print(f"KL(average of products, base) = {divergence(average, start):.2e}")
    for row in evaluations:
        shown = {name: round(value, 4) for name, value in row.items() if name.startswith(("mean@", "pass@", "maj@"))}
        print(f"step {row['step']}: {shown}")


if __name__ == "__main__":
    main()
