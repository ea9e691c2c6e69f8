"""Targets that stay in real workers from scoring to update: the engine's losses against those of the local engine.

The teacher is the student as it was before all its weights were scaled, reads another prompt, and has another head.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from mopd_nemo.losses.objectives import Divergence, Objective, PolicyGradient, SampledReverseKL
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.types import TrainExample
from tests.integration.nemo.ranks import cut, engine_of, nemo_config, run_ranks

SCALE, RATE, K = 1.05, 1e-3, 8
OBJECTIVES: dict[str, Objective] = {
    "full, forward": Divergence("forward_kl", support="full"),
    "full, reverse": Divergence("reverse_kl", support="full"),
    "full, jsd": Divergence("jsd", alpha=0.3, support="full"),
    "full, by divergence": Divergence("jsd", support="full", weights="divergence"),
    "full, sharper": Divergence("jsd", support="full", weights="sharper"),
    "student": Divergence("jsd", support="student_topk", k=K),
    "student, no tail": Divergence("reverse_kl", support="student_topk", k=K, tail=False),
    "student, by entropy": Divergence("jsd", support="student_topk", k=K, weights="student_entropy"),
    "teacher, clipped": Divergence("forward_kl", support="teacher_topk", k=K, entry_clip=0.05),
    "student, contrast": Divergence("forward_kl", support="student_topk", k=K, contrast=0.7),
    "teacher": Divergence("reverse_kl", support="teacher_topk", k=K),
    "teacher, contrast, no tail": Divergence("jsd", support="teacher_topk", k=K, contrast=0.7, tail=False),
    "sampled": SampledReverseKL(),
}
CUTS = {
    "padded": cut(1),
    "packed": cut(1, packed=True),
    "dp2, packed": cut(2, packed=True),
    "tp2": cut(2, tensor=2),
    "tp2, packed, sequence parallel": cut(2, tensor=2, packed=True, sequence=True),
    "cp2, packed": cut(2, context=2, packed=True),
    "pp2, packed": cut(2, pipeline=2, packed=True),
}


def settings(name: str, updates: int = 1, support: str = "student_topk") -> Any:
    return nemo_config(
        teacher={"kind": "frozen"},
        divergence={"k": K, "support": support, "kind": "reverse_kl"},
        optimizer={"weight_decay": 0.0, "max_grad_norm": 1e6},
        train={"num_updates_per_step": updates},
        nemo=CUTS[name],
    )


def step(objective: Objective, groups: int = 3) -> TrainBatch:
    """Rows of some problems: with two teacher prompts, with one, and one row with none, which only has an advantage."""
    draw = random.Random(0)
    rows = []
    for group in range(groups):
        prompt = tuple(draw.randrange(3, 400) for _ in range(6 + group))
        for number in range(3):
            response = tuple(draw.randrange(3, 400) for _ in range(draw.randint(2, 9)))
            failures = (9, 9, 8, *prompt) if objective.reads_contrast and number == 1 else None
            sampled = tuple(-6.0 - draw.random() for _ in response)
            teacher = (5, 6, *prompt, 7, number % 2)
            rows.append(
                TrainExample(
                    group, number, prompt, response, sampled, teacher, number - 1.0, contrast_prompt_ids=failures
                )
            )
    terms = [LossTerm(objective, tuple(range(len(rows))))]
    return TrainBatch(rows, terms)


def with_a_gradient_of_policy() -> TrainBatch:
    """A second term, about rows that no teacher reads, too; and tokens without loss."""
    batch = step(Divergence("jsd", support="full"))
    masked = [replace(row, masked=(0,)) if row.rollout_index == 1 else row for row in batch.examples]
    rows = [*masked, TrainExample(1, 3, (4, 5), (6, 7, 8), (-6.0,) * 3, None, 2.0)]
    return TrainBatch(rows, [*batch.terms, LossTerm(PolicyGradient(), tuple(range(len(rows))), weight=0.5)])


def measured(engine: Any, config: Any, scale: Any) -> dict[str, dict[str, float]]:
    """Metrics of an update on each objective, without one; then of two that move the weights."""
    nothing = step(OBJECTIVES["teacher"])
    engine.update(nothing, engine.score(nothing)[0], 0.0)  # starts the workers, and with them the teacher
    scale()
    found = {}
    for name, objective in OBJECTIVES.items():
        batch = step(objective)
        found[name] = engine.update(batch, engine.score(batch)[0], 0.0)
    object.__setattr__(config.train, "num_updates_per_step", 2)  # whose candidates are those of before the first
    for name in ("student", "student, contrast"):
        batch = step(OBJECTIVES[name])
        found[f"{name}, two updates"] = engine.update(batch, engine.score(batch)[0], 0.0)
    object.__setattr__(config.train, "num_updates_per_step", 1)
    for number, batch in enumerate((step(OBJECTIVES["full, jsd"]), with_a_gradient_of_policy())):
        found[f"moved {number}"] = engine.update(batch, engine.score(batch)[0], RATE)
    return found


@torch.no_grad()
def scale_worker(worker: Any) -> None:
    for parameter in worker.model.parameters():
        parameter.mul_(SCALE)


def on_ranks(cuts: list[str]) -> dict[str, Any]:
    found = {}
    for name in cuts:
        config = settings(name)
        engine = engine_of(config)
        metrics = measured(engine, config, lambda engine=engine: scale_worker(engine._runtime.student.worker))
        assert engine._runtime.student.worker._kept is None, "targets outlive their update"
        found[name] = metrics, engine._runtime.student.sent, shifted(engine), engine._runtime.student.worker.exported()
    return found


def shifted(engine: Any) -> tuple[float, float]:
    """The loss of a batch as it is kept, and with the teacher's rows one token late."""
    losses = []
    for shift in (0, 1):
        batch = step(OBJECTIVES["full, forward"])
        targets, _ = engine.score(batch)
        kept = engine._runtime.student.worker._kept
        for row in kept._rows.values():
            row["hidden"] = row["hidden"].roll(shift, 0)
        losses.append(engine.update(batch, targets, 0.0)["loss"])
    return losses[0], losses[1]


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for world in (1, 2):
        cuts = [name for name, own in CUTS.items() if own["gpus_per_node"] == world]
        ranks = run_ranks(on_ranks, world, cuts)
        found |= {name: [rank[name] for rank in ranks] for name in cuts}
    return found


@pytest.fixture(scope="module")
def local() -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The local engine on the same rows: `token_loss` on hidden states and heads of Hugging Face models."""
    from mopd_nemo.engines.local.engine import LocalEngine

    config = settings("padded")
    engine = LocalEngine(config.model_copy(update={"engine": "local"}))

    @torch.no_grad()
    def scale() -> None:
        for parameter in engine.student.module.parameters():
            parameter.mul_(SCALE)

    return measured(engine, config, scale), engine.student.module.state_dict()


@pytest.mark.parametrize("name", CUTS)
def test_losses_gradients_and_signals_equal_those_of_the_local_engine(name: str, results: Any, local: Any) -> None:
    expected, weights = local
    for metrics, _, _, exported in results[name]:
        for objective, wanted in expected.items():
            own = metrics[objective]
            sampled = objective == "sampled"  # whose value means nothing
            assert sampled or own["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-7), objective
            assert own["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4), objective
            if "full" in objective or (
                objective.startswith("student") and "two updates" not in objective
            ):  # hidden states: nothing is missing
                names = {key for key in wanted if key.startswith(("student/", "teacher/", "topk", "sampler/"))}
                for signal in names:
                    assert own.get(signal, 0.0) == pytest.approx(wanted[signal], rel=1e-4, abs=1e-6), (
                        objective,
                        signal,
                    )
        for key, weight in exported.items():
            torch.testing.assert_close(weight, weights[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CUTS)
def test_a_teacher_that_is_one_token_late_is_another(name: str, results: Any) -> None:
    for _, _, (loss, late), _ in results[name]:
        assert abs(late - loss) > 1e-2 * loss


SIGNALS = ("full, forward", "student", "student, no tail", "student, contrast")


def signals(engine: Any, scale: Any) -> dict[str, Any]:
    """What is said of tokens under some objectives, with a row that no teacher reads in the middle."""
    nothing = step(OBJECTIVES["full, jsd"])
    engine.update(nothing, engine.score(nothing)[0], 0.0)
    scale()
    found = {}
    for name in SIGNALS:
        batch = step(OBJECTIVES[name])
        rows, unread = list(batch.examples), TrainExample(1, 3, (4, 5), (6, 7, 8), (-6.0,) * 3, None, 2.0)
        batch = TrainBatch(
            [*rows[:4], unread, *rows[4:]],
            [
                LossTerm(OBJECTIVES[name], tuple(i for i in range(len(rows) + 1) if i != 4)),
                LossTerm(PolicyGradient(), (4,)),
            ],
        )
        targets, _ = engine.score(batch)
        found[name] = engine.token_signal(batch, targets, 3)
        engine.update(batch, targets, 0.0)  # which still finds its targets
    return found


def signals_on_ranks(cuts: list[str]) -> dict[str, Any]:
    found = {}
    for name in cuts:
        engine = engine_of(settings(name))
        found[name] = signals(engine, lambda engine=engine: scale_worker(engine._runtime.student.worker))
    return found


@pytest.mark.parametrize(
    "names", [["padded", "packed"], ["dp2, packed", "tp2", "tp2, packed, sequence parallel", "cp2, packed"]]
)
def test_signal_of_tokens_is_that_of_the_local_engine(names: list[str]) -> None:
    from mopd_nemo.engines.local.engine import LocalEngine

    engine = LocalEngine(settings("padded").model_copy(update={"engine": "local"}))

    @torch.no_grad()
    def scale() -> None:
        for parameter in engine.student.module.parameters():
            parameter.mul_(SCALE)

    wanted = signals(engine, scale)
    ranks = run_ranks(signals_on_ranks, CUTS[names[0]]["gpus_per_node"], names)
    for rank in ranks:
        for cut_name, found in rank.items():
            for objective in SIGNALS:
                assert found[objective][4] is None and wanted[objective][4] is None
                for own, other in zip(found[objective], wanted[objective], strict=True):
                    for field in () if other is None else other.__dataclass_fields__:
                        a, b = (torch.from_numpy(getattr(signal, field)) for signal in (own, other))
                        assert a.dtype == b.dtype and a.shape == b.shape, (cut_name, objective, field)
                        if field.endswith("ids"):
                            assert (a == b).all(), (cut_name, objective, field)
                        else:
                            # Ranks that share a layer add in another order; a token too late would differ by nats.
                            exact = 1e-5 if len(ranks) == 1 else 1e-4
                            torch.testing.assert_close(
                                a, b, atol=exact, rtol=1e-5, msg=f"{cut_name} {objective} {field}"
                            )
            assert found["student"][0].divergence.max() > 1e-3, "the teacher is another model"


IDS = {"input_ids", "input_lengths", "prompt_lengths", "keys"}
WEIGHTS = {"token_mask", "sample_mask", "advantages", "weights", "sampler"}


@pytest.mark.parametrize("name", CUTS)
def test_only_ids_lengths_and_weights_are_sent(name: str, results: Any) -> None:
    """What else the driver sends are the sampled tokens, to be scored as such: 4 bytes each."""
    for _, sent, _, _ in results[name]:
        assert {method for method, _ in sent} == {"keep_targets", "train"}
        for method, columns in sent:
            assert columns.keys() - {"candidates"} <= (IDS if method == "keep_targets" else IDS | WEIGHTS)
            assert columns.get("candidates", 0) < columns["input_ids"]
