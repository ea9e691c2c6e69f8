"""A causal LM split where training needs it: hidden states of chosen rows, and the head that turns them into logits.

Shape suffixes: B sequences, S positions, T response tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from mopd_nemo.embedded import resolve_model_path
from mopd_nemo.errors import UserError

transformers_logging.disable_progress_bar()  # its bars would tear the live display

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LanguageModel:
    """A Hugging Face causal LM with its body and its head apart.

    Args:
        module: the model; its weights may be wider than `dtype`.
        dtype: precision of the computation.
    """

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self.module = module.eval()  # no dropout: a live teacher must be the student exactly
        self.dtype = dtype
        self.device: torch.device = next(module.parameters()).device
        self.head: nn.Linear = module.get_output_embeddings()

    def computing(self) -> AbstractContextManager[Any]:
        """The context in which this model computes: autocast when weights are wider than `dtype`."""
        weights = next(self.module.parameters()).dtype
        return nullcontext() if weights == self.dtype else torch.autocast(self.device.type, self.dtype)

    def hidden_BSH(self, ids_BS: Tensor) -> Tensor:
        """Last hidden states of right-padded sequences. Padding comes last, so causality alone keeps it out."""
        return self.module.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state

    def response_hidden_TH(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states that predict the response tokens of a batch, laid end to end.

        Response token t of a sequence with P prompt tokens is predicted at position P - 1 + t.
        """
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        ids_BS = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        rows: list[Tensor] = []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            ids_BS[i, : lengths[i]] = torch.tensor([*prompt, *response])
            start = i * ids_BS.shape[1] + len(prompt) - 1
            rows.append(torch.arange(start, start + len(response)))
        hidden_BSH = self.hidden_BSH(ids_BS.to(self.device))
        return hidden_BSH.flatten(0, 1)[torch.cat(rows).to(self.device)]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name, tied ones once."""
        return dict(self.module.named_parameters())


def load_model(path: str, *, key: str, dtype: torch.dtype, weights: torch.dtype, device: torch.device) -> LanguageModel:
    """Load a model directory or hub name.

    Args:
        key: config key that named the path, used in errors.
        dtype: compute precision.
        weights: storage precision.

    Raises:
        UserError: it cannot be loaded, or its logits are not simply its head applied to its hidden states.
    """
    try:
        module = AutoModelForCausalLM.from_pretrained(resolve_model_path(path), dtype=weights).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={path}: cannot load a causal language model: {_first_line(error)}") from error
    model = LanguageModel(module, dtype)
    _check_plain_head(model, key, path)
    return model


def load_tokenizer(path: str, *, key: str) -> Any:
    """The tokenizer of a model directory or hub name."""
    try:
        return AutoTokenizer.from_pretrained(resolve_model_path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={path}: cannot load a tokenizer: {_first_line(error)}") from error


def check_vocabularies(student: str, teacher: str) -> None:
    """Student and teacher must give the same meaning to every token id. Reads tokenizers and configs, no weights.

    Raises:
        UserError: naming what differs.
    """
    pair = {"model.path": student, "teacher.path": teacher}
    vocabularies = [load_tokenizer(path, key=key).get_vocab() for key, path in pair.items()]
    if vocabularies[0] != vocabularies[1]:
        differing = len(set(vocabularies[0].items()) ^ set(vocabularies[1].items()))
        raise UserError(
            f"teacher.path={teacher}: its tokenizer differs from that of model.path={student} in {differing} entries; "
            "token-level distillation needs one vocabulary: choose a teacher of the student's family"
        )
    sizes = [AutoConfig.from_pretrained(resolve_model_path(path)).vocab_size for path in pair.values()]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"teacher.path={teacher}: its head has {sizes[1]} tokens, that of model.path={student} {sizes[0]}; "
            "choose a teacher with the same vocab_size"
        )


def resolve_device(name: str) -> torch.device:
    """`auto` or a device name as a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"model.device={name!r}: not a device name; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"model.device={name!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use model.device=cpu"
        )
    return device


@torch.no_grad()
def _check_plain_head(model: LanguageModel, key: str, path: str) -> None:
    """Some models scale or cap their logits after the head; then head(hidden) would train the wrong distribution."""
    ids_BS = torch.arange(4, device=model.device).unsqueeze(0)
    with model.computing():
        logits = model.module(input_ids=ids_BS, use_cache=False).logits
        plain = model.head(model.hidden_BSH(ids_BS))
    if not torch.allclose(logits.float(), plain.float(), atol=1e-3, rtol=1e-3):
        raise UserError(
            f"{key}={path}: this model transforms its logits after the head (soft-capping or scaling), which the local "
            "engine does not support; choose a model with a plain head, such as Qwen3 or Llama"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
