"""Updates by NeMo-RL's real worker with `BatchLoss`, under every cut, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mopd_nemo.engines.nemo.batches import train_batch
from mopd_nemo.losses.logits import Head, Tokens, TopK
from mopd_nemo.losses.objectives import (
    Divergence,
    LogLikelihood,
    Objective,
    PolicyGradient,
    SampledReverseKL,
    Suppression,
)
from mopd_nemo.losses.token_loss import token_loss
from mopd_nemo.types import TrainExample
from tests.conftest import EMBEDDED
from tests.integration.nemo.ranks import cut, dealt, nemo_config, run_ranks, start
from tests.integration.nemo.test_scoring import LENGTHS, VOCAB, sequences

K = 6
LESSONS: dict[str, tuple[Objective, ...]] = {
    "jsd": (Divergence("jsd", support="teacher_topk", k=K),),
    "the control without a teacher": (Suppression(0.01),),
    "reverse kl and policy gradient": (Divergence("reverse_kl", support="teacher_topk", k=K), PolicyGradient()),
    "sampled": (SampledReverseKL(),),
    "likelihood": (LogLikelihood(),),
}
CUTS = {
    "padded": cut(1),
    "packed": cut(1, packed=True),
    "dp2": cut(2),
    "packed, cp2": cut(2, context=2, packed=True),
    "tp2": cut(2, tensor=2),
    "packed, tp2, cp2, sequence parallel": cut(4, tensor=2, context=2, packed=True, sequence=True),
    "packed, pp2, cp2": cut(4, pipeline=2, context=2, packed=True),
}
RATE = 1e-3
EPSILON = 1e-3
"""Of Adam: it keeps it smooth where a gradient is all rounding."""


def lesson_rows(lesson: str) -> tuple[list[TrainExample], list[Tensor], list[TopK | None]]:
    """Rows, weights [parts, tokens] and teacher targets; the same in every process."""
    generator = torch.Generator().manual_seed(1)
    rows, weights, targets = [], [], []
    for number, (ids, (prompt, size)) in enumerate(zip(sequences(), LENGTHS, strict=True)):
        sampled = tuple((-7.0 - 3.0 * torch.rand(size, generator=generator)).tolist())
        rows.append(TrainExample(0, number, tuple(ids[:prompt]), tuple(ids[prompt:]), sampled, advantage=number - 1.5))
        weights.append(torch.rand(len(LESSONS[lesson]), size, generator=generator))
        if len(LESSONS[lesson]) > 1:
            weights[-1][1 if number % 2 else 0] = 0.0  # parts about different rows
        if lesson == "sampled":
            ids_RK = torch.tensor(ids[prompt:])[:, None].int()
        else:
            ids_RK = torch.stack([torch.randperm(VOCAB, generator=generator)[:K] for _ in range(size)]).int()
        logprobs_RK = (torch.randn(size, 8, generator=generator) * 2).log_softmax(-1)[:, : ids_RK.shape[-1]]
        targets.append(TopK(ids_RK, logprobs_RK))
    return rows, weights, targets


def expected() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Loss and gradient norm of an update on each lesson, one after the other, and the weights that come of them.

    One process, the Hugging Face model, `token_loss` and torch's Adam.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    adam = torch.optim.Adam(model.parameters(), lr=RATE, eps=EPSILON, betas=(0.9, 0.999))
    found = []
    for lesson in LESSONS:
        adam.zero_grad()
        loss = loss_on(model, lesson)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        found.append((loss.item(), norm.item()))
    return found, {name: weight.detach() for name, weight in model.state_dict().items()}


def loss_on(model: Any, lesson: str) -> Tensor:
    head = model.lm_head.weight[:VOCAB]
    rows, weights, targets = lesson_rows(lesson)
    loss = torch.zeros(())
    for row, weights_PR, target in zip(rows, weights, targets, strict=True):
        assert target is not None
        sequence = torch.tensor([[*row.prompt_ids, *row.response_ids]])
        hidden = model.model(sequence).last_hidden_state[0, len(row.prompt_ids) - 1 : -1]
        ids = torch.tensor(row.response_ids)
        tokens = Tokens(ids, torch.full((len(ids),), row.advantage), None, torch.tensor(row.sampled_logprobs))
        for objective, weights_R in zip(LESSONS[lesson], weights_PR, strict=True):
            if isinstance(objective, SampledReverseKL):
                student_R = (hidden @ head.T).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
                ratio_R = (student_R.detach() - tokens.sampler_logprobs_T).exp().clamp(max=2.0)
                teacher_R = target.logprobs_TK.squeeze(-1)
                loss = loss + ((student_R - teacher_R).detach() * student_R * ratio_R * weights_R).sum()
                continue
            teacher = TopK(target.ids_TK.long(), target.logprobs_TK) if isinstance(objective, Divergence) else None
            clip = None if isinstance(objective, LogLikelihood) else 2.0
            own = token_loss(objective, Head(hidden, head), tokens, teacher, weights_T=weights_R, importance_clip=clip)
            loss = loss + own.total
    return loss


def updates(cuts: list[str]) -> dict[str, Any]:
    """On each rank and for each cut: NeMo-RL's results of an update on each lesson, and the model at the end."""
    from mopd_nemo.engines.nemo.workers.loss import BatchLoss

    found = {}
    for name in cuts:
        policy = {"megatron_cfg": {"optimizer": {"adam_eps": EPSILON}}}
        settings = nemo_config(optimizer={"weight_decay": 0.0}, nemo=CUTS[name] | {"policy": policy})
        worker = start(settings)
        results = []
        for lesson in LESSONS:
            multiple = worker.cfg["make_sequence_length_divisible_by"]
            batch = train_batch(*lesson_rows(lesson), None, pad_id=0, length_multiple=multiple)
            size = len(batch["weights"])
            data, _ = dealt(worker, batch, batch_size=size)
            worker.prepare_for_training()
            worker.set_learning_rate(rate=RATE)
            loss = BatchLoss(LESSONS[lesson], 2.0, VOCAB, watch=K, student_support=True)
            results.append(worker.train(data, loss, gbs=size, mbs=2))
        found[name] = results, worker.exported()
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for world in (1, 2, 4):
        cuts = [name for name, own in CUTS.items() if own["gpus_per_node"] == world]
        ranks = run_ranks(updates, world, cuts)
        found |= {name: [rank[name] for rank in ranks] for name in cuts}
    return found


@pytest.fixture(scope="module")
def one_process() -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    return expected()


@pytest.mark.parametrize("name", CUTS)
def test_updates_and_what_a_refit_sends_equal_those_of_one_process(name: str, results: Any, one_process: Any) -> None:
    steps, weights = one_process
    for number, (lesson, (loss, norm)) in enumerate(zip(LESSONS, steps, strict=True)):
        ranks = [found[number] for found, _ in results[name]]
        assert [float(result["grad_norm"]) for result in ranks] == pytest.approx([norm] * len(ranks), rel=1e-3), lesson
        if lesson not in ("sampled", "reverse kl and policy gradient"):  # there only gradients mean something
            assert total(name, ranks, "loss") == pytest.approx(loss, rel=1e-4), lesson
    for _, exported in results[name]:  # by every rank whole, and updated
        for key, weight in exported.items():
            torch.testing.assert_close(
                weight, weights[key], atol=5e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name", CUTS)
def test_signals_are_those_of_all_response_tokens(name: str, results: Any) -> None:
    one, ranks = [results["padded"][0][0][0]], [found[0] for found, _ in results[name]]
    for signal in ("student/entropy", "student/topk_mass", "teacher/topk_mass", "sampler/gap"):
        expected = total("padded", one, signal)
        assert expected > 0 and total(name, ranks, signal) == pytest.approx(expected, rel=1e-4), signal


def total(name: str, ranks: list[Any], metric: str) -> float:
    """A sum over all rows, from what each rank says of the rows that it shares with others."""
    copies = 1 if name == "dp2" else len(ranks)
    return sum(sum(result["all_mb_metrics"][metric]) for result in ranks) / copies
