"""Teach the format on families of its own: `python -m recipes.real_model.warm_start MODEL_DIR OUTPUT_DIR`.

Out of the box the model solves 7 % of the problems, too few for groups with successes and failures. A dozen AdamW
steps on worked examples bring it to about a half, without any family of the experiment.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mopd_nemo.chat import Chat
from recipes.real_model.building import building, say
from recipes.real_model.families import Task, tasks

BATCH_SIZE = 8
IGNORED = -100  # cross_entropy's label for positions that are not learned


def main(
    model: Annotated[Path, typer.Argument(help="Converted model.")],
    output: Annotated[Path, typer.Argument(help="Directory to write the model into. Left alone if it is there.")],
    num_steps: Annotated[int, typer.Option(help="AdamW steps of 8 examples.")] = 12,
    learning_rate: Annotated[float, typer.Option(help="Reached after 4 steps.")] = 2e-5,
    seed: Annotated[int, typer.Option(help="Examples and their order.")] = 0,
) -> None:
    if output.exists():
        say(f"{output} is there already")
        return
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    chat = Chat(AutoTokenizer.from_pretrained(model))
    fit(student, chat, num_steps, learning_rate, seed)
    with building(output) as new:
        student.save_pretrained(new)
        chat.tokenizer.save_pretrained(new)
    say(f"wrote {output}")


def fit(model: PreTrainedModel, chat: Chat, num_steps: int, learning_rate: float, seed: int) -> list[float]:
    """Fit the model to worked examples. Returns the loss of every step, in nats per response token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    start = time.monotonic()
    for step, batch in zip(range(1, num_steps + 1), batches(seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 4)
        ids_BS, labels_BS = rows(batch, chat)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BSV = model(ids_BS).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BSV[:, :-1].flatten(0, 1).float(), labels_BS[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        left = (time.monotonic() - start) / step * (num_steps - step)
        say(f"warm start {step}/{num_steps}: loss {losses[-1]:.3f}, {left:.0f} s left")
    return losses


def batches(seed: int) -> Iterator[list[Task]]:
    """Examples of the warm-start families, as often as each has constants (at most 8), shuffled anew each epoch."""
    epoch = 0
    while True:
        examples = list(tasks("warm", 8, seed))
        random.Random(f"warm/{seed}/{epoch}").shuffle(examples)
        yield from (examples[i : i + BATCH_SIZE] for i in range(0, len(examples) - BATCH_SIZE + 1, BATCH_SIZE))
        epoch += 1


def rows(batch: list[Task], chat: Chat) -> tuple[Tensor, Tensor]:
    """Token ids and labels, padded on the right: prompt, worked answer, end of turn; only the last two are learned."""
    prompts = [chat.prompt_ids(({"role": "user", "content": task.prompt},)) for task in batch]
    answers = [chat.tokenizer(task.solution, add_special_tokens=False)["input_ids"] for task in batch]
    answers = [[*answer, chat.tokenizer.eos_token_id] for answer in answers]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids_BS = torch.full((len(batch), width), chat.pad_id)
    labels_BS = torch.full((len(batch), width), IGNORED)
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = len(prompt), len(prompt) + len(answer)
        ids_BS[b, :end] = torch.tensor([*prompt, *answer])
        labels_BS[b, start:end] = torch.tensor(answer)
    return ids_BS, labels_BS


if __name__ == "__main__":
    typer.run(main)
