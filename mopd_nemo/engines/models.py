"""Tokenizers, and checks of a model's vocabulary and positions before any weights are loaded; for every engine."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoTokenizer

from mopd_nemo.chat import Chat
from mopd_nemo.config import ModelConfig, UserError
from mopd_nemo.embedded import resolve_model_path

HUB_SECONDS = 10
"""In which the hub must answer a first question."""
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's file in a directory with adapters, which names the model that they belong to."""


def load_tokenizer(path: str, *, key: str) -> Any:
    """The tokenizer of a model directory or hub name.

    Raises:
        UserError: there is no such directory, or no tokenizer can be read from it.
    """
    check_directory(path, key)
    try:
        return AutoTokenizer.from_pretrained(resolve_model_path(path))
    except Exception as error:  # damaged files make libraries raise anything
        raise UserError(
            f"{key}={path}: cannot load a tokenizer: {first_line(error)}; give a directory with tokenizer.json and "
            "tokenizer_config.json, as save_pretrained writes it"
        ) from error


def load_model_config(path: str, *, key: str) -> Any:
    """The `transformers` config of a model directory or hub name.

    Raises:
        UserError: there is no such directory, or no config can be read from it.
    """
    check_directory(path, key)
    try:
        return AutoConfig.from_pretrained(resolve_model_path(path))
    except Exception as error:  # as above
        raise UserError(
            f"{key}={path}: cannot read its config.json: {first_line(error)}; give a Hugging Face model directory"
        ) from error


def check_directory(path: str, key: str) -> None:
    """What can only be a directory of this machine is one, and what may be a hub name can be looked up.

    Raises:
        UserError: it is not there, or no model is in it; or it is in no cache, and the hub cannot be reached.
    """
    directory = Path(path)
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"{key}={path}: no config.json in it; give a Hugging Face model directory")
    elif directory.exists():
        raise UserError(f"{key}={path}: a file; give the directory of the model")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/"):
        written_out = ", with ~ written out" if path.startswith("~") else ""
        raise UserError(f"{key}={path}: no such directory; give that of a Hugging Face model{written_out}")
    elif path == resolve_model_path(path) and not _is_cached(path) and not _hub_answers():
        raise UserError(
            f"{key}={path}: no such directory, and no model that was fetched from the hub before; {ENDPOINT} cannot be "
            "reached: give a model directory"
        )


def _is_cached(name: str) -> bool:
    with suppress(HFValidationError):
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    return False


@cache
def _hub_answers() -> bool:
    """Whether the hub can be asked: one try, where its library takes more than a minute to give up."""
    if HF_HUB_OFFLINE:
        return False
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError:  # it does answer
        return True
    except (OSError, HTTPException) as error:
        return isinstance(getattr(error, "reason", None), SSLError)  # the hub's library has certificates of its own
    return True


def check_is_whole(path: str, key: str, needs: str) -> None:
    """A directory holds the weights of a model, and not adapters of one.

    Args:
        needs: who cannot work with adapters, used in errors.

    Raises:
        UserError: it holds adapters.
    """
    if (Path(path) / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{key}={path}: holds adapters, and {needs} needs a whole model: make one with "
            f"`mopd export {path} --merge --output DIR`, and give DIR"
        )


def check_tokenizer(chat: Chat, model: Any, name: str) -> None:
    """Every token that text can have is one of the model's.

    Tokens beyond its vocabulary that only other uses have, such as that of an image, are left alone.

    Args:
        model: its `transformers` config.
        name: of the model, used in errors.

    Raises:
        UserError: ordinary tokens, those of the chat template or those that end a response are not.
    """
    size = model.get_text_config().vocab_size
    beyond = {index: token for token, index in chat.tokenizer.get_vocab().items() if index >= size}
    added = chat.tokenizer.get_added_vocab()
    needed = [token for token in beyond.values() if token not in added]
    needed += [beyond[index] for index in sorted(chat.template_ids() | chat.end_ids) if index in beyond]
    if needed:
        raise UserError(
            f"model.path={name}: its tokenizer has {len(needed)} tokens that the model lacks (vocab_size={size}), such "
            f"as {needed[0]!r}: give the tokenizer that the model was trained with"
        )


def load_chat(model: ModelConfig) -> Chat:
    """The student's tokenizer and chat template, checked against its vocabulary."""
    tokenizer = load_tokenizer(model.path, key="model.path")
    chat = Chat(tokenizer, model.chat_template_kwargs, model.end_tokens, source=model.path)
    check_tokenizer(chat, load_model_config(model.path, key="model.path"), model.path)
    return chat


def check_vocabularies(student: str, teacher: str, key: str = "teacher.path") -> None:
    """Student and teacher have the same vocabulary. Reads tokenizers and configs, no weights.

    Args:
        key: config key that named the teacher, used in errors.

    Raises:
        UserError: they differ.
    """
    pair = {"model.path": student, key: teacher}
    vocabularies = [load_tokenizer(path, key=named).get_vocab() for named, path in pair.items()]
    if vocabularies[0] != vocabularies[1]:
        differing = len(set(vocabularies[0].items()) ^ set(vocabularies[1].items()))
        raise UserError(
            f"{key}={teacher}: its tokenizer differs from that of model.path={student} in {differing} entries; "
            "token-level distillation needs one vocabulary: choose a teacher of the student's family"
        )
    sizes = [load_model_config(path, key=named).get_text_config().vocab_size for named, path in pair.items()]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{key}={teacher}: its head has {sizes[1]} tokens, that of model.path={student} {sizes[0]}; "
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
            "lower one of them (`mopd init` chooses them for a model and its problems)"
        )


def first_line(error: Exception) -> str:
    """The first line of its message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
