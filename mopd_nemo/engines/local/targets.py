"""What a teacher says of responses, in the form that the local engine's losses read.

Shape suffixes: T response tokens, K likeliest tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mopd_nemo.engines.base import Progress, TokenCounts
from mopd_nemo.engines.local.model import LanguageModel
from mopd_nemo.engines.served import Teaching
from mopd_nemo.losses.logits import Head, TopK
from mopd_nemo.methods.batch import TrainBatch
from mopd_nemo.types import TrainExample


@dataclass(frozen=True, slots=True)
class Target:
    """What a teacher says of one response.

    Of a teacher in this process, hidden states: its head is applied chunk by chunk, where the student's own top-k is
    known. That is the same work, and no [tokens, vocabulary] tensor is kept. Of a served one, its likeliest tokens.
    """

    head: nn.Linear | None = None
    """That of the teacher, which reads the hidden states. Targets of one pass share it."""
    hidden_TH: Tensor | None = None
    """After the teacher's prompt; they predict the response."""
    contrast_TH: Tensor | None = None
    """After the contrast prompt, if there is one."""
    topk: TopK | None = None
    """Of a served teacher: its likeliest tokens, or the sampled one."""
    reference: Target | None = None
    """What the student's initial weights say after the student's prompt, where an objective reads them. The other
    fields are then empty if no teacher reads the response."""

    @property
    def taught(self) -> bool:
        """A teacher reads the response."""
        return self.head is not None or self.topk is not None


def read_by_model(
    teacher: LanguageModel,
    examples: Sequence[TrainExample],
    budget: Callable[[Sequence[int]], int],
    on_progress: Progress | None,
) -> tuple[list[Target], dict[str, float]]:
    """Targets of examples that all have a teacher prompt, from a model in this process; and metrics of its passes.

    Args:
        budget: tokens of a batch, as `LanguageModel.batches` counts them, given the lengths of the sequences.
    """
    read = [(number, example.teacher_prompt_ids or ()) for number, example in enumerate(examples)]
    read += [(n, example.contrast_prompt_ids) for n, example in enumerate(examples) if example.contrast_prompt_ids]
    prompts, responses = [prompt for _, prompt in read], [examples[number].response_ids for number, _ in read]
    sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    micro_batches = teacher.batches([[sequence] for sequence in sequences], budget(lengths))
    teacher.counts = TokenCounts()
    states: dict[int, Tensor] = {}
    with teacher.on_device() as head:
        for done, members in enumerate(micro_batches, start=1):
            with teacher.computing():
                hidden_TH = teacher.response_hidden_TH([prompts[m] for m in members], [responses[m] for m in members])
            states |= zip(members, hidden_TH.split([len(responses[m]) for m in members]), strict=True)
            if on_progress:
                on_progress(done / len(micro_batches))
    targets = [Target(head, states[number]) for number in range(len(examples))]
    for member in range(len(examples), len(read)):
        number = read[member][0]
        targets[number] = replace(targets[number], contrast_TH=states[member])
    return targets, teacher.counts.metrics("score", sum(lengths))


def add_references(
    targets: list[Target | None],
    batch: TrainBatch,
    reference: LanguageModel,
    budget: Callable[[Sequence[int]], int],
    on_progress: Progress | None,
) -> None:
    """Add to a batch's targets what the initial weights say of the examples whose objective reads them."""
    held = sorted({i for term in batch.terms if term.objective.reads_reference for i in term.examples})
    if not held:
        return
    rows = [batch.examples[i] for i in held]
    plain = [replace(row, teacher_prompt_ids=row.prompt_ids, contrast_prompt_ids=None) for row in rows]
    found, _ = read_by_model(reference, plain, budget, on_progress)
    for i, of_reference in zip(held, found, strict=True):
        targets[i] = replace(targets[i] or Target(), reference=of_reference)


def read_by_server(
    answers: Teaching, device: torch.device, on_progress: Progress | None
) -> tuple[list[Target], dict[str, float]]:
    """Targets from servers, which are asked already, and metrics of the requests."""
    found, metrics = answers(on_progress)
    return [Target(topk=topk.to(device)) for topk in found], metrics


def joined(targets: Sequence[Target], dtype: torch.dtype) -> Head | TopK:
    """What the one teacher of several responses says, laid end to end; so may several served ones.

    Args:
        dtype: of `joined_hidden`.
    """
    if targets[0].head is not None:
        return joined_hidden(targets, dtype)
    found = [target.topk for target in targets if target.topk is not None]
    sampled = [topk.sampled_T for topk in found if topk.sampled_T is not None]
    return TopK(
        torch.cat([topk.ids_TK for topk in found]),
        torch.cat([topk.logprobs_TK for topk in found]),
        torch.cat(sampled) if len(sampled) == len(found) else None,
    )


def joined_hidden(targets: Sequence[Target], dtype: torch.dtype, contrast: bool = False) -> Head:
    """What the one teacher in this process says of several responses.

    Args:
        dtype: precision of the computation. An average may be wider, and narrow student's weights need no autocast.
        contrast: after the contrast prompt of each, or the only one where there is none.
    """
    head = targets[0].head
    assert head is not None  # `config.checks` refuses what only hidden states can answer
    parts = [t.contrast_TH if contrast and t.contrast_TH is not None else t.hidden_TH for t in targets]
    hidden_TH = torch.cat([part for part in parts if part is not None])
    return Head(hidden_TH.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype))
