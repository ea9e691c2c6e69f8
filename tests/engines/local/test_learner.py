"""Student against teacher through the whole local engine."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mopd_nemo.engines.base import Request, Sampling
from mopd_nemo.engines.local.engine import LocalEngine
from mopd_nemo.engines.local.targets import Target
from mopd_nemo.losses.objectives import Divergence, Dpo, LogLikelihood, Objective, PolicyGradient, ReferenceKL, Simpo
from mopd_nemo.losses.reference import importance_weights, token_divergence
from mopd_nemo.methods.batch import LossTerm, TrainBatch
from mopd_nemo.methods.opd import divergence_objective
from mopd_nemo.types import TrainExample

Make = Callable[..., LocalEngine]
PROMPTS = [(5, 6, 7), (9, 8, 7, 6, 5, 4, 3), (11,), (12, 13)]
COST = {f"{phase}/{name}" for phase in ("score", "update") for name in ("tokens", "tokens_alone", "padding")}
TEACHER_PROMPTS = [(50, 51, 5, 6, 7), (60, 9, 8, 7, 6, 5, 4, 3), (70, 71, 72, 11), (80, 12, 13)]


def make_rows(
    engine: LocalEngine, teacher_prompts: Sequence[tuple[int, ...] | None], advantages: Sequence[float] = (0.0, 0.0)
) -> list[TrainExample]:
    groups = engine.generate(Request(PROMPTS, 2, Sampling(9), "rows"))
    return [
        TrainExample(g, r, PROMPTS[g], rollout.response_ids, rollout.logprobs, teacher_prompts[g], advantages[r])
        for g, group in enumerate(groups)
        for r, rollout in enumerate(group)
    ]


def make_batch(rows: list[TrainExample], *objectives: Objective) -> TrainBatch:
    """Every row learned by every objective."""
    return TrainBatch(rows, [LossTerm(objective, tuple(range(len(rows)))) for objective in objectives])


def update(engine: LocalEngine, batch: TrainBatch, learning_rate: float) -> dict[str, float]:
    targets, scored = engine.score(batch)
    return engine.update(batch, targets, learning_rate) | scored


def score(engine: LocalEngine, rows: list[TrainExample]) -> list[Target | None]:
    return engine.score(TrainBatch(rows, []))[0]


def learn(engine: LocalEngine, rows: list[TrainExample], learning_rate: float) -> dict[str, float]:
    """One update on the configured divergence."""
    config = engine._config
    return update(engine, make_batch(rows, divergence_objective(config.divergence)), learning_rate)


def weights(engine: LocalEngine) -> dict[str, torch.Tensor]:
    return copy.deepcopy(engine.student.module.state_dict())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(
    "support", ["full", "student_topk", "teacher_topk", "student_topk divergence.tail=false divergence.k=7"]
)
def test_student_equal_to_teacher_without_peers_has_no_loss(make: Make, kind: str, support: str) -> None:
    engine = make("teacher.kind=live", f"divergence.kind={kind}", *f"divergence.support={support}".split(" "))
    rows = make_rows(engine, PROMPTS)
    metrics = learn(engine, rows, 0.0)
    assert abs(metrics["loss"]) < 1e-6
    assert metrics["grad_norm"] < 1e-5
    assert metrics["topk_overlap"] == pytest.approx(1.0)
    assert abs(metrics["teacher/advantage"]) < 1e-5


def test_teacher_rows_shifted_by_one_are_caught(make: Make) -> None:
    engine = make("teacher.kind=live")
    rows = make_rows(engine, PROMPTS)
    targets = [(target, target.hidden_TH) for target in score(engine, rows) if target is not None]
    shifted = [replace(t, hidden_TH=hidden_TH.roll(1, dims=0)) for t, hidden_TH in targets if hidden_TH is not None]
    assert engine.update(make_batch(rows, Divergence()), shifted, learning_rate=0.0)["loss"] > 1e-2


def test_peers_make_a_loss_and_an_update_lowers_it(make: Make) -> None:
    engine = make("teacher.kind=frozen", "train.num_steps=1")
    rows = make_rows(engine, TEACHER_PROMPTS)
    targets = score(engine, rows)
    losses = [engine.update(make_batch(rows, Divergence()), targets, learning_rate=3e-3)["loss"] for _ in range(8)]
    assert losses[0] > 1e-3
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("support", ["student_topk", "sampled divergence.kind=reverse_kl"])
def test_micro_batches_change_neither_loss_nor_weights(make: Make, aggregation: str, support: str) -> None:
    results = []
    for tokens in (1, 40, 100_000):
        engine = make(
            f"train.aggregation={aggregation}",
            *f"divergence.support={support}".split(" "),
            f"train.tokens_per_micro_batch={tokens}",
        )
        rows = make_rows(engine, TEACHER_PROMPTS)
        metrics = learn(engine, rows, 1e-3)
        learned = {name: value for name, value in metrics.items() if name not in COST}
        results.append((learned, weights(engine)))
    for metrics, state in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-3, abs=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, results[0][1][name], atol=2e-5, rtol=1e-4)


def test_what_rows_have_in_common_is_counted_once(make: Make) -> None:
    rows = [TrainExample(0, r, (5, 6), (7,) * (r + 2), (-1.0,) * (r + 2), tuple(range(20, 40))) for r in range(3)]
    engine = make("teacher.kind=live")
    metrics = learn(engine, rows, 0.0)
    assert (metrics["score/tokens"], metrics["score/tokens_alone"]) == (20 + 3, 60 + 9)
    assert (metrics["update/tokens"], metrics["update/tokens_alone"]) == (2 + 3, 6 + 9)
    assert metrics["score/padding"] == metrics["update/padding"] == 0.0

    engine.student.reads_trees = False  # then the teacher's batch has 21, 22 and 23 tokens, the student's 3, 4 and 5
    metrics = learn(engine, rows, 0.0)
    assert (metrics["score/tokens"], metrics["update/tokens"]) == (3 * 23, 3 * 5)
    assert metrics["score/padding"] == pytest.approx(3 / 69)
    assert metrics["update/padding"] == pytest.approx(3 / 15)


def test_rows_longer_than_a_micro_batch_share_their_context_when_scored(make: Make) -> None:
    rows = [TrainExample(0, r, (5, 6), (7 + r,) * 10, (-1.0,) * 10, tuple(range(20, 60))) for r in range(4)]
    metrics = learn(make("teacher.kind=live", "train.tokens_per_micro_batch=16"), rows, 0.0)
    assert metrics["score/tokens"] == 40 + 4 * 9


def test_sampler_and_trainer_agree_on_the_sampled_tokens(make: Make) -> None:
    engine = make()
    rows = make_rows(engine, TEACHER_PROMPTS)
    assert learn(engine, rows, 0.0)["sampler/gap"] < 1e-5


def test_no_rows_no_step(make: Make) -> None:
    engine = make()
    before = weights(engine)
    assert engine.update(TrainBatch([], []), score(engine, []), learning_rate=1.0) == {"update/skipped": 1.0}
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())


def test_non_finite_gradient_skips_the_update(make: Make) -> None:
    engine = make()
    rows = make_rows(engine, TEACHER_PROMPTS)
    targets = score(engine, rows)
    assert targets[0] is not None and targets[0].hidden_TH is not None
    targets[0] = replace(targets[0], hidden_TH=targets[0].hidden_TH * float("nan"))
    before = weights(engine)
    assert engine.update(make_batch(rows, Divergence()), targets, learning_rate=1.0)["update/skipped"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())


def test_bfloat16_computes_narrow_and_keeps_wide_weights(make: Make) -> None:
    engine = make("model.dtype=bfloat16")
    rows = make_rows(engine, TEACHER_PROMPTS)
    targets = score(engine, rows)
    before = weights(engine)
    metrics = engine.update(make_batch(rows, Divergence()), targets, learning_rate=1e-6)
    after = weights(engine)
    assert metrics["loss"] > 1e-3
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before), "a rate of 1e-6 must move float32 weights; in bfloat16 it would not"


NO_TEACHER = [None] * len(PROMPTS)


def logprobs(engine: LocalEngine, row: TrainExample) -> torch.Tensor:
    """Of the response tokens, by a plain forward pass; differentiable."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
    logits_TV = engine.student.module(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].float()
    return logits_TV.log_softmax(-1).gather(-1, torch.tensor(row.response_ids)[:, None]).squeeze(-1)


def expected_norm(engine: LocalEngine, loss: torch.Tensor) -> float:
    """Gradient norm of a loss written out by hand."""
    parameters = list(engine.student.module.parameters())
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.stack([g.norm() for g in grads if g is not None]).norm().item()


def check(engine: LocalEngine, given: TrainBatch, by_hand: torch.Tensor) -> None:
    norm = expected_norm(engine, by_hand)
    metrics = update(engine, given, learning_rate=0.0)
    assert metrics["loss"] == pytest.approx(by_hand.item(), rel=1e-4, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert norm > 1e-3


def test_policy_gradient_is_minus_advantage_times_logprob(make: Make) -> None:
    engine = make("method=grpo")
    rows = make_rows(engine, NO_TEACHER, advantages=(0.5, -0.25))
    num_tokens = sum(len(row.response_ids) for row in rows)
    # At the policy that sampled, the ratio is 1 and its gradient that of the log-probability.
    by_hand = sum(
        (-row.advantage * (lp - lp.detach() + 1)).sum() for row in rows if (lp := logprobs(engine, row)) is not None
    )
    check(engine, make_batch(rows, PolicyGradient()), by_hand / num_tokens)


def test_zero_loss_examples_count_in_the_mean_and_cost_nothing(make: Make) -> None:
    engine = make("method=grpo")
    rows = make_rows(engine, NO_TEACHER, advantages=(0.5, 0.0))
    loud, zero_loss = tuple(range(0, len(rows), 2)), tuple(range(1, len(rows), 2))
    every = engine.update(make_batch(rows, PolicyGradient()), score(engine, rows), learning_rate=0.0)
    term = LossTerm(PolicyGradient(), loud, zero_loss=zero_loss)
    some = engine.update(TrainBatch(rows, [term]), score(engine, rows), learning_rate=0.0)
    assert some["grad_norm"] == pytest.approx(every["grad_norm"], rel=1e-4)
    assert some["loss"] == pytest.approx(every["loss"], rel=1e-4)


@pytest.mark.parametrize("micro_batch", ["16", "4096"])
def test_masked_tokens_have_no_loss_and_count_in_the_mean(make: Make, micro_batch: str) -> None:
    engine = make("method=verified_sft", f"train.tokens_per_micro_batch={micro_batch}")
    rows = [replace(row, masked=(0, 2)) if row.rollout_index else row for row in make_rows(engine, NO_TEACHER)]
    kept = [
        torch.tensor([float(t not in row.masked) for t in range(len(row.response_ids))], dtype=torch.float32)
        for row in rows
    ]
    by_hand = -torch.cat([logprobs(engine, row) * keep for row, keep in zip(rows, kept, strict=True)]).mean()
    check(engine, make_batch(rows, LogLikelihood()), by_hand)


def test_sft_is_minus_mean_logprob(make: Make) -> None:
    engine = make("method=verified_sft")
    rows = make_rows(engine, NO_TEACHER)
    by_hand = -torch.cat([logprobs(engine, row) for row in rows]).mean()
    check(engine, make_batch(rows, LogLikelihood()), by_hand)


def test_dpo_against_its_formula(make: Make) -> None:
    engine = make("method=dpo", "dpo.beta=0.3")
    rows = make_rows(engine, PROMPTS)
    # Move the student off its reference first: at the start every margin is zero.
    engine.update(make_batch(rows[:1], LogLikelihood()), score(engine, rows[:1]), learning_rate=3e-2)
    reference = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        assert engine.teacher.model is not None
        logits_TV = engine.teacher.model.module(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        reference.append(logits_TV.log_softmax(-1).gather(-1, torch.tensor(row.response_ids)[:, None]).sum().detach())
    ratio = [logprobs(engine, row).sum() - ref for row, ref in zip(rows, reference, strict=True)]
    pairs = [-torch.log(torch.sigmoid(0.3 * (ratio[i] - ratio[i + 1]))) for i in range(0, len(rows), 2)]
    assert abs(pairs[0].item() - 0.6931) > 1e-3
    check(engine, make_batch(rows, Dpo(0.3)), torch.stack(pairs).mean())


def test_simpo_against_its_formula(make: Make) -> None:
    engine = make("method=simpo")
    rows = make_rows(engine, NO_TEACHER)
    mean = [logprobs(engine, row).mean() for row in rows]
    pairs = [-torch.log(torch.sigmoid(2.0 * (mean[i] - mean[i + 1]) - 1.0)) for i in range(0, len(rows), 2)]
    check(engine, make_batch(rows, Simpo(2.0, 1.0)), torch.stack(pairs).mean())


def test_parts_add_up_and_share_rows(make: Make) -> None:
    engine = make("policy_gradient.weight=0.5")
    rows = make_rows(engine, TEACHER_PROMPTS, advantages=(1.0, -1.0))
    targets = score(engine, rows)
    every = tuple(range(len(rows)))
    alone = [engine.update(make_batch(rows, o), targets, 0.0)["loss"] for o in (Divergence(), PolicyGradient())]
    both = TrainBatch(rows, [LossTerm(Divergence(), every), LossTerm(PolicyGradient(), every, weight=0.5)])
    metrics = engine.update(both, targets, 0.0)
    assert metrics["loss"] == pytest.approx(alone[0] + 0.5 * alone[1], rel=1e-4)
    assert metrics["loss/policy_gradient"] == pytest.approx(0.5 * alone[1], rel=1e-4)


def test_clip_bites_from_the_second_update_on(make: Make) -> None:
    """With one update the ratio is 1 and clipping cannot matter; with several it does."""

    def norms(clip: str, updates: int) -> float:
        engine = make("method=grpo", f"policy_gradient.clip_high={clip}", f"train.num_updates_per_step={updates}")
        rows = make_rows(engine, NO_TEACHER, advantages=(2.0, 1.0))
        # All groups share a prompt, so the first update moves the second one's ratios.
        same = [replace(row, prompt_ids=PROMPTS[0], response_ids=rows[0].response_ids) for row in rows]
        objective = PolicyGradient(clip_high=float(clip))
        return engine.update(make_batch(same, objective), score(engine, same), learning_rate=1e-2)["grad_norm"]

    assert norms("0.01", 1) == pytest.approx(norms("100", 1))
    assert norms("0.01", 4) < 0.5 * norms("100", 4)


def test_mini_batches_keep_groups_together(make: Make) -> None:
    engine = make("method=grpo")
    rows = make_rows(engine, NO_TEACHER, advantages=(1.0, -1.0))
    updates = make_batch(rows, PolicyGradient()).updates(3)
    groups = [{rows[i].group_index for term in terms for i in term.examples} for terms in updates]
    assert groups == [{0, 1}, {2, 3}]
    assert sorted(i for terms in updates for term in terms for i in term.examples) == list(range(len(rows)))


def test_importance_weights_follow_the_sampler(make: Make) -> None:
    """A sampler that gave half the trainer's probability doubles the loss; beyond the clip it does no more."""
    engine = make("method=grpo")
    rows = make_rows(engine, NO_TEACHER, advantages=(1.0, 0.5))

    def loss(shift: float) -> float:
        off = [replace(row, sampled_logprobs=tuple(x - shift for x in row.sampled_logprobs)) for row in rows]
        return engine.update(make_batch(off, PolicyGradient()), score(engine, off), learning_rate=0.0)["loss"]

    assert loss(0.5) == pytest.approx(loss(0.0) * math.exp(0.5), rel=1e-3)
    assert loss(3.0) == pytest.approx(loss(0.0) * 2.0, rel=1e-3)


CONTRAST_PROMPTS = [(90, 91, 5, 6, 7), None, (92, 11), (93, 94, 95, 12, 13)]


def contrasting(rows: list[TrainExample]) -> list[TrainExample]:
    """With a second teacher prompt for three of the four groups."""
    return [replace(row, contrast_prompt_ids=CONTRAST_PROMPTS[row.group_index]) for row in rows]


@pytest.mark.parametrize("tail", [True, False])
def test_a_contrast_of_two_prompts_is_that_of_the_formulas(make: Make, tail: bool) -> None:
    engine = make("teacher.kind=frozen")
    objective = Divergence("jsd", k=20, tail=tail, contrast=0.7)
    rows = contrasting(make_rows(engine, TEACHER_PROMPTS))
    batch, teacher = make_batch(rows, objective), engine.teacher.model
    assert teacher is not None
    losses = []
    for row in rows:
        prompts = [row.prompt_ids, row.teacher_prompt_ids, row.contrast_prompt_ids or row.teacher_prompt_ids]
        with torch.no_grad():
            student, success, failure = (
                model.head(model.response_hidden_TH([prompt], [row.response_ids])).double()
                for model, prompt in zip((engine.student, teacher, teacher), prompts, strict=True)
            )
        divergence = token_divergence(
            student, success, kind="jsd", k=20, tail=tail, contrast=0.7, contrast_logits_TV=failure
        )
        losses.append(divergence * _clipped(student, row))
    expected = torch.cat(losses).mean().item()
    assert update(engine, batch, 0.0)["loss"] == pytest.approx(expected, rel=1e-4)


def _clipped(student_TV: torch.Tensor, row: TrainExample) -> torch.Tensor:
    ids_T = torch.tensor(row.response_ids)[:, None]
    logprobs_T = student_TV.log_softmax(-1).gather(-1, ids_T).squeeze(-1)
    return importance_weights(logprobs_T, torch.tensor(row.sampled_logprobs).double(), 2.0)


@pytest.mark.parametrize(
    "setting", ["divergence.weights=sharper", "divergence.weights=divergence", "divergence.contrast=1.0"]
)
def test_weights_and_contrasts_do_not_depend_on_micro_batches(make: Make, setting: str) -> None:
    found = []
    for budget in (40, 100_000):
        engine = make("teacher.kind=frozen", "peers.failures=1", setting, f"train.tokens_per_micro_batch={budget}")
        rows = contrasting(make_rows(engine, TEACHER_PROMPTS))
        metrics = learn(engine, rows, 1e-3)
        found.append((weights(engine), metrics))
    (first, one), (second, other) = found
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-5, rtol=1e-4)
    for name in one.keys() - COST:
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    signals = {"sharper": "teacher/sharper", "=divergence": "token/weight", "contrast": "teacher/contrast"}
    assert {name for name in signals.values() if name in one} == {signals[key] for key in signals if key in setting}


def test_the_pull_to_the_initial_weights_grows_with_the_distance_and_survives_a_resume(
    make: Make, tmp_path: Path
) -> None:
    settings = ("teacher.kind=ema", "reference.kl=0.5")
    engine = make(*settings)
    rows = make_rows(engine, TEACHER_PROMPTS)
    terms = [LossTerm(Divergence(), tuple(range(4))), LossTerm(ReferenceKL(), tuple(range(8)), 0.5)]
    batch = TrainBatch(rows, terms)
    first = update(engine, batch, 3e-3)
    assert abs(first["loss/reference_kl"]) < 1e-6 and first["loss"] == pytest.approx(first["loss/divergence"], abs=1e-6)
    before = make(*settings)
    expected = []
    for row in rows:
        with torch.no_grad():
            student, reference = (
                e.student.head(e.student.response_hidden_TH([row.prompt_ids], [row.response_ids])).double()
                for e in (engine, before)
            )
        expected.append(token_divergence(student, reference, kind="reverse_kl") * _clipped(student, row))
    engine.save(tmp_path)
    again = make(*settings)
    again.load(tmp_path)
    for found in (update(again, batch, 0.0), update(engine, batch, 0.0)):
        assert found["loss/reference_kl"] == pytest.approx(0.5 * torch.cat(expected).mean().item(), rel=1e-3)
        assert found["loss/reference_kl"] > 1e-3


def test_a_pull_alone_leads_back(make: Make) -> None:
    """Without a teacher, as in grpo."""
    engine = make("teacher.kind=none", "method=grpo", "reference.kl=1.0")
    rows = [replace(row, teacher_prompt_ids=None) for row in make_rows(engine, PROMPTS)]
    update(engine, make_batch(rows, LogLikelihood()), 3e-3)
    pulls = [update(engine, make_batch(rows, ReferenceKL()), 1e-3)["loss"] for _ in range(6)]
    assert pulls[0] > 1e-3 and pulls[-1] < 0.7 * pulls[0]


def test_the_second_prompt_alone_makes_a_contrast(make: Make) -> None:
    engine = make("teacher.kind=frozen", "peers.failures=1", "divergence.contrast=1.0")
    rows = make_rows(engine, TEACHER_PROMPTS)
    same = [replace(row, contrast_prompt_ids=row.teacher_prompt_ids) for row in rows]
    plain = update(engine, make_batch(rows, Divergence()), 0.0)["loss"]
    assert learn(engine, rows, 0.0)["loss"] == pytest.approx(plain)
    assert learn(engine, same, 0.0)["loss"] == pytest.approx(plain)
    assert abs(learn(engine, contrasting(rows), 0.0)["loss"] - plain) > 1e-3
