"""Tokenizers, and checks of a model's vocabulary and positions before any weights are loaded; for every engine."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer

from mopd_nemo.chat import Chat
from mopd_nemo.config import ModelConfig, UserError
from mopd_nemo.embedded import resolve_model_path


def load_tokenizer(path: str, *, key: str) -> Any:
    """The tokenizer of a model directory or hub name."""
    try:
        return AutoTokenizer.from_pretrained(resolve_model_path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={path}: cannot load a tokenizer: {first_line(error)}") from error


def load_chat(model: ModelConfig) -> Chat:
    """The student's tokenizer and chat template."""
    tokenizer = load_tokenizer(model.path, key="model.path")
    return Chat(tokenizer, model.chat_template_kwargs, model.end_tokens, source=model.path)


def check_vocabularies(student: str, teacher: str) -> None:
    """Student and teacher have the same vocabulary. Reads tokenizers and configs, no weights.

    Raises:
        UserError: they differ.
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


def check_positions(model: Any, name: str, key: str, prompt: int, response: int) -> None:
    """A prompt with a response fits the positions of a model.

    Args:
        model: its `transformers` config.
        name: of the model, used in errors.
        key: config key that limits the prompt.

    Raises:
        UserError: they do not.
    """
    limit = getattr(model, "max_position_embeddings", None)
    if limit is not None and prompt + response > limit:
        raise UserError(
            f"{key}={prompt} + rollout.max_response_tokens={response} exceeds the {limit} positions of {name}: "
            "lower one of them"
        )


def first_line(error: Exception) -> str:
    """The first line of its message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
