"""Make the embedded model again: `python -m recipes.embedded_model.prepare OUTPUT_DIR`.

Trains a tokenizer and a tiny Qwen3 on `corpus` and saves both in Hugging Face format. About 25 minutes on two idle CPU
cores. The model that ships in `mopd_nemo/embedded/arithmetic` was made with the defaults; another machine gives the
same tokenizer and, up to rounding, the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress, TextColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mopd_nemo.chat import Chat
from mopd_nemo.config import Templates
from mopd_nemo.engines.local.model import micro_batches
from recipes.embedded_model.corpus import Example, examples, to_ids

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BATCH_SIZE = 128
PEAK_LEARNING_RATE = 3e-3
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
"""Pre-tokens: words with their space, single digits, punctuation, line breaks."""


def make_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text can be encoded, the task's words are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare = Chat(_wrap(tokenizer))
    tokenizer.train_from_iterator(_texts(islice(examples(bare, seed=0), 4000)), trainer)
    return _wrap(tokenizer)


def make_model(vocab_size: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.85 million parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float()


def prepare(
    output: Annotated[Path, typer.Argument(help="Directory to write the model into.")],
    num_steps: Annotated[int, typer.Option(help="Optimiser steps of 128 examples.")] = 600,
    seed: Annotated[int, typer.Option(help="Initial weights and examples.")] = 0,
) -> None:
    """Train the model and save it with its tokenizer."""
    tokenizer = make_tokenizer()
    chat = Chat(tokenizer)
    model = make_model(len(tokenizer), seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    stream = examples(chat, seed + 1)
    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("preparing", total=num_steps, loss=float("nan"))
        for step in range(num_steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, num_steps)
            loss = _accumulate(model, [to_ids(example, chat) for example in islice(stream, BATCH_SIZE)], chat.pad_id)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, loss=loss)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _learning_rate(step: int, num_steps: int) -> float:
    """Warm up over 100 steps, hold, and fall linearly over the last 30 %."""
    remaining = 1.0 - step / num_steps
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 100, max(remaining / 0.3, 0.02))


def _accumulate(model: Qwen3ForCausalLM, rows: list[tuple[tuple[int, ...], int]], pad_id: int) -> float:
    """Accumulate the gradient of the mean next-token loss over the learned part of all rows."""
    num_tokens = sum(len(ids) - start for ids, start in rows)
    total = 0.0
    for batch in micro_batches([len(ids) for ids, _ in rows], max_tokens=2048):
        width = max(len(rows[i][0]) for i in batch)
        ids_BS = torch.full((len(batch), width), pad_id)
        labels_BS = torch.full((len(batch), width), -100)
        for b, i in enumerate(batch):
            ids, start = rows[i]
            ids_BS[b, : len(ids)] = torch.tensor(ids)
            labels_BS[b, start : len(ids)] = torch.tensor(ids[start:])
        loss = _next_token_loss(model, ids_BS, labels_BS) / num_tokens
        loss.backward()
        total += loss.item()
    return total


def _next_token_loss(model: Qwen3ForCausalLM, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
    logits_BSV = model(input_ids=ids_BS).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS[:, 1:].flatten(), reduction="sum")


def _texts(stream: Iterator[Example]) -> Iterator[str]:
    yield from (f"user\n{example.user}\nassistant\n{example.response}" for example in stream)
    yield from [" ".join(Templates().model_dump().values())] * 200


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


if __name__ == "__main__":
    typer.run(prepare)
