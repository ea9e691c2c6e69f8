"""`mopd init`: a config for a model and its problems, with budgets read from both."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from mopd_nemo.commands import check_output
from mopd_nemo.config import UserError
from mopd_nemo.terminal import Terminal

ROUND = 64
"""Budgets are multiples of this many tokens."""
FRAME = 256
"""Tokens for the headings around two peers."""
MAX_RESPONSE = 4096
"""The paper's limit of a response."""
UNKNOWN_WINDOW = 8192
"""Where a model does not say how many positions it has."""

TEMPLATE = """\
# Written by `mopd init`. Every setting: docs/configuration.md.
# Look before you train: mopd train --config {file} --dry-run
name: {name}

model:
  path: {model}
  dtype: {dtype}  # of the computation; weights and optimiser are float32

data:
  train: {train}  # {num_problems} problems: {tasks}
{evaluation}  max_prompt_tokens: {prompt}  # the longest prompt has {longest}

rollout:
  num_prompts_per_step: {per_step}
  num_rollouts_per_prompt: 8
  max_response_tokens: {response}  # lower it if answers are short: steps are then faster
  batch_size: {batch}  # sequences decoded at once

peers:  # which peers help this model? mopd preflight --config {file}
  successes: 2
  failures: 0
  max_peer_tokens: {response}  # a peer is shown whole
  max_context_tokens: {context}  # prompt, two peers and their headings; the model has {window} positions

optimizer:
  learning_rate: 1.0e-5
  warmup_steps: 10

train:
  num_steps: 100
  eval_every: {eval_every}{no_eval}
  checkpoint_every: 50
  keep_checkpoints: 2
  tokens_per_micro_batch: {micro_batch}
"""


def init(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="Hugging Face model directory.")],
    problems: Annotated[
        Path, typer.Argument(metavar="DATA_FILE", help="JSONL with {id, prompt or messages, answer, task}.")
    ],
    held_out: Annotated[Path | None, typer.Option("--eval", help="Held-out problems, in the same form.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Config file to write.")] = Path("mine.yaml"),
) -> None:
    """Write a commented config for a model and its problems; budgets are read from both.

    mopd init path/to/model train.jsonl --eval eval.jsonl --output mine.yaml
    """
    if output.exists():
        raise UserError(f"--output {output}: exists; choose another file")
    check_output(output, "--output")
    text = _settings(model, problems, held_out, output)

    from mopd_nemo.config.load import load_config
    from mopd_nemo.files import write_text

    write_text(output, text)
    load_config(output)
    console = Terminal()
    console.print(text, soft_wrap=True)
    console.print(
        f"{output} is written. Next: mopd train --config {shlex.quote(str(output))} --dry-run", soft_wrap=True
    )


def _settings(model: str, problems: Path, held_out: Path | None, output: Path) -> str:
    import torch

    from mopd_nemo.chat import with_prompt_ids
    from mopd_nemo.config import Config, ModelConfig
    from mopd_nemo.data.load import read_problems
    from mopd_nemo.engines.models import load_chat, load_model_config
    from mopd_nemo.outlook import free_memory

    chat = load_chat(ModelConfig(path=model))
    shape = load_model_config(model, key="model.path").get_text_config()
    rows = read_problems(str(problems), "DATA_FILE")
    others = read_problems(str(held_out), "--eval") if held_out else []
    longest = max(len(p.prompt_ids) for p in with_prompt_ids([*rows, *others], chat, 10**9))
    window = getattr(shape, "max_position_embeddings", None) or UNKNOWN_WINDOW
    prompt = -(-longest // ROUND) * ROUND
    response = min((window - prompt - FRAME) // 3 // ROUND * ROUND, MAX_RESPONSE)
    if response < ROUND:
        raise UserError(
            f"MODEL_DIR={model}: its {window} positions have no room for prompts of {longest} tokens, two peers and a "
            "response: choose a model with a longer window, or leave out the longest problems"
        )
    heads, layers = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads, shape.num_hidden_layers
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    cuda = torch.cuda.is_available()
    cached = 2 * layers * heads * head * (2 if cuda else 4) * (prompt + response)
    fitting = max(int(free_memory(Config()) * 0.25) // cached, 1)
    tasks = Counter(problem.task for problem in rows)
    evaluation = f"  eval: {_quoted(held_out)}  # {len(others)} problems\n" if held_out else ""
    return TEMPLATE.format(
        file=output,
        name=_quoted(output.stem),
        model=_quoted(model),
        dtype="bfloat16" if cuda else "float32",
        train=_quoted(problems),
        num_problems=len(rows),
        tasks=", ".join(f"{count} {task}" for task, count in tasks.most_common()),
        evaluation=evaluation,
        prompt=prompt,
        longest=longest,
        per_step=min(32, len(rows)),
        response=response,
        batch=min(256, 1 << (fitting.bit_length() - 1)),
        context=prompt + 2 * response + FRAME,
        window=window,
        eval_every=5 if held_out else 0,
        no_eval=""
        if held_out
        else "  # without held-out problems there is nothing to evaluate: name them as data.eval",
        micro_batch=16384 if cuda else 2048,
    )


def _quoted(value: str | os.PathLike[str]) -> str:
    """Text as YAML reads it back, whatever is in it."""
    return json.dumps(os.fspath(value), ensure_ascii=False)
