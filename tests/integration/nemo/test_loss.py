"""`LessonLoss` through NeMo-RL's post-processor and packing wrapper on real Megatron logits, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mopd_nemo.engines.nemo.batches import Targets, train_batch
from mopd_nemo.losses import (
    Divergence,
    Head,
    LogLikelihood,
    Objective,
    PolicyGradient,
    SampledReverseKL,
    Tokens,
    TopK,
    token_loss,
)
from mopd_nemo.types import TrainRow
from tests.conftest import EMBEDDED
from tests.integration.nemo.ranks import run_ranks
from tests.integration.nemo.test_scoring import LENGTHS, sequences

K = 6
LESSONS: dict[str, tuple[Objective, ...]] = {
    "jsd": (Divergence("jsd", support="teacher_topk", k=K),),
    "reverse kl and policy gradient": (Divergence("reverse_kl", support="teacher_topk", k=K), PolicyGradient()),
    "sampled": (SampledReverseKL(),),
    "likelihood": (LogLikelihood(),),
}
CUTS = {
    "packed": (1, 1, 1, True, False),
    "packed, cp2": (1, 1, 2, True, False),
    "tp2": (2, 1, 1, False, False),
    "packed, tp2, cp2, sequence parallel": (2, 1, 2, True, True),
    "packed, pp2, cp2": (1, 2, 2, True, False),
}
NAMES = ("decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.1.mlp.linear_fc2.weight", "output_layer.weight")


def lesson_rows(lesson: str) -> tuple[list[TrainRow], list[Tensor], list[Targets | None]]:
    """Rows, weights [parts, tokens] and teacher targets; the same in every process."""
    generator = torch.Generator().manual_seed(1)
    rows, weights, targets = [], [], []
    for number, (ids, (prompt, size)) in enumerate(zip(sequences(), LENGTHS, strict=True)):
        sampled = tuple((-3.0 * torch.rand(size, generator=generator)).tolist())
        rows.append(TrainRow(0, number, tuple(ids[:prompt]), tuple(ids[prompt:]), sampled, advantage=number - 1.5))
        weights.append(torch.rand(len(LESSONS[lesson]), size, generator=generator) * 0.1)
        if len(LESSONS[lesson]) > 1:
            weights[-1][1 if number % 2 else 0] = 0.0  # parts about different rows
        if lesson == "sampled":
            ids_RK = torch.tensor(ids[prompt:])[:, None].int()
        else:
            ids_RK = torch.stack([torch.randperm(428, generator=generator)[:K] for _ in range(size)]).int()
        logprobs_RK = (torch.randn(size, 8, generator=generator) * 2).log_softmax(-1)[:, : ids_RK.shape[-1]]
        targets.append(Targets(ids_RK, logprobs_RK))
    return rows, weights, targets


def expected(lesson: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients from `token_loss` on the Hugging Face model without attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    head = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    rows, weights, targets = lesson_rows(lesson)
    loss = torch.zeros(())
    for row, weights_PR, target in zip(rows, weights, targets, strict=True):
        assert target is not None
        hidden = model.model.embed_tokens(torch.tensor([*row.prompt_ids, *row.response_ids]))
        for layer in model.model.layers:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        hidden = model.model.norm(hidden)[len(row.prompt_ids) - 1 : -1]
        ids = torch.tensor(row.response_ids)
        tokens = Tokens(ids, torch.full((len(ids),), row.advantage), None, torch.tensor(row.sampled_logprobs))
        for objective, weights_R in zip(LESSONS[lesson], weights_PR, strict=True):
            if isinstance(objective, SampledReverseKL):
                student_R = (hidden @ head.T).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
                ratio_R = (student_R.detach() - tokens.sampler_logprobs_T).exp().clamp(max=2.0)
                teacher_R = target.logprobs_RK.squeeze(-1)
                loss = loss + ((student_R - teacher_R).detach() * student_R * ratio_R * weights_R).sum()
                continue
            teacher = TopK(target.ids_RK.long(), target.logprobs_RK) if isinstance(objective, Divergence) else None
            clip = None if isinstance(objective, LogLikelihood) else 2.0
            loss = (
                loss
                + token_loss(
                    objective, Head(hidden, head), tokens, teacher, weights_T=weights_R, importance_clip=clip
                ).total
            )
    loss.backward()
    layers = model.model.layers
    fc1 = torch.cat([layers[0].mlp.gate_proj.weight.grad, layers[0].mlp.up_proj.weight.grad])
    return loss.item(), dict(zip(NAMES, (fc1, layers[1].mlp.down_proj.weight.grad, head.grad), strict=True))


def losses_and_gradients(cuts: list[str]) -> dict[tuple[str, str], Any]:
    """On each rank: summed loss metric and whole gradients, by cut and lesson."""
    return {(cut, lesson): _train(*CUTS[cut], lesson) for cut in cuts for lesson in LESSONS}


def _train(tp: int, pp: int, cp: int, packed: bool, sequence_parallel: bool, lesson: str) -> Any:
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from nemo_rl.distributed.batched_data_dict import BatchedDataDict
    from nemo_rl.models.megatron.data import get_microbatch_iterator
    from nemo_rl.models.megatron.train import LossPostProcessor, megatron_forward_backward

    from mopd_nemo.engines.nemo.loss import LessonLoss
    from tests.integration.nemo.qwen3 import build, start_megatron

    start_megatron(tp, pp, cp)
    model = build(
        EMBEDDED,
        attention=False,
        sequence_parallel=sequence_parallel,
        padded_vocab=448,
        calculate_per_token_loss=True,  # as NeMo-RL sets it: gradients of ranks are summed
    )
    batch = train_batch(*lesson_rows(lesson), None, pad_id=0, length_multiple=8, count_multiple=3)
    data: Any = BatchedDataDict(batch)
    if packed:
        (data,), _ = data.shard_by_batch_size(
            1,
            batch_size=data.size,
            sequence_packing_args={
                "algorithm": "modified_first_fit_decreasing",
                "input_key": "input_ids",
                "input_lengths_key": "input_lengths",
                "sequence_length_pad_multiple": 8,
                "max_tokens_per_microbatch": 40,
            },
        )
    cfg = {
        "dynamic_batching": {"enabled": False},
        "sequence_packing": {"enabled": packed},
        "make_sequence_length_divisible_by": 8,
        "megatron_cfg": {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "context_parallel_size": cp,
            "sequence_parallel": sequence_parallel,
        },
    }
    iterator, count, size, _, length = get_microbatch_iterator(data, cfg, 2, straggler_timer=None)
    loss = LessonLoss(LESSONS[lesson], 2.0, 428, watch=K, student_support=True)
    outputs = megatron_forward_backward(
        model=model,
        data_iterator=iterator,
        num_microbatches=count,
        seq_length=length,
        mbs=size,
        post_processing_fn=LossPostProcessor(loss, cfg, num_microbatches=count),
        global_valid_seqs=torch.tensor(4.0),
        global_valid_toks=torch.tensor(21.0),
    )
    gradients = {}
    for name, parameter in model.named_parameters():
        if name not in NAMES or (pp > 1 and ps.get_pipeline_model_parallel_rank() and name != NAMES[2]):
            continue
        gradient = parameter.grad.clone()
        dist.all_reduce(gradient, group=ps.get_context_parallel_group())  # what Megatron's DDP does
        parts = [torch.empty_like(gradient) for _ in range(tp)]
        dist.all_gather(parts, gradient, group=ps.get_tensor_model_parallel_group())
        gradients[name] = torch.cat(_halves(parts), 0) if "fc1" in name else torch.cat(parts, int("fc2" in name))
    totals: dict[str, float] = {}
    for output in outputs:
        for name, value in output.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals, gradients


def _halves(parts: list[Tensor]) -> list[Tensor]:
    """Gate and up, which every rank has a slice of."""
    return [half for which in (0, 1) for half in (part.chunk(2)[which] for part in parts)]


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for world in (1, 2, 4):
        cuts = [cut for cut, (tp, pp, cp, *_) in CUTS.items() if tp * pp * cp == world]
        found |= dict.fromkeys(cuts, run_ranks(losses_and_gradients, world, cuts))
    return found


@pytest.mark.parametrize("lesson", LESSONS)
@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradient_equal_those_of_one_process(cut: str, lesson: str, results: Any) -> None:
    loss, gradients = expected(lesson)
    ranks = [rank[cut, lesson] for rank in results[cut]]
    if lesson not in ("sampled", "reverse kl and policy gradient"):  # there only gradients mean something
        assert [totals["loss"] for totals, _ in ranks if totals] == pytest.approx(
            [loss] * sum(1 for t, _ in ranks if t)
        )
    seen = set()
    for _, found in ranks:
        for name, gradient in found.items():
            seen.add(name)
            whole = torch.zeros_like(gradient)
            whole[: len(gradients[name])] = gradients[name]  # padded columns of the vocabulary get none
            torch.testing.assert_close(gradient, whole, atol=1e-5, rtol=1e-4)
    assert seen == set(NAMES)


@pytest.mark.parametrize("cut", CUTS)
def test_signals_are_those_of_all_response_tokens(cut: str, results: Any) -> None:
    one, _ = results["packed"][0]["packed", "jsd"]
    for totals, _ in (rank[cut, "jsd"] for rank in results[cut]):
        if totals:
            for name in ("student/entropy", "student/topk_mass", "teacher/topk_mass", "sampler/gap"):
                assert one[name] > 0 and totals[name] == pytest.approx(one[name], rel=1e-4)
