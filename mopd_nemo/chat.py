"""The one place where messages become token ids and ids become text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mopd_nemo.config import UserError
from mopd_nemo.types import Message, Problem


class Chat:
    """A Hugging Face tokenizer with a chat template.

    Args:
        tokenizer: any `PreTrainedTokenizerBase` with a chat template and an end-of-sequence token.
        template_kwargs: passed to the chat template, e.g. `{"enable_thinking": False}`.
        source: where the tokenizer came from, named in errors.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None, source: str = "model") -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"{source}: the tokenizer has no chat template; use an instruction-tuned model or add a chat_template"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"{source}: the tokenizer has no eos_token; set one in tokenizer_config.json")
        self.tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        self._control_tokens: list[str] = sorted(
            {token for token in tokenizer.all_special_tokens if len(token) > 1}, key=len, reverse=True
        )

    @property
    def pad_id(self) -> int:
        """Id used to fill batches; never attended to."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The templated prompt, ending with the assistant header."""
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **self._template_kwargs
        )

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of `prompt_text`."""
        return self.encode(self.prompt_text(messages))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids; control tokens in the text become control tokens, none are added."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def escape_control_tokens(self, text: str) -> str:
        """Break up every chat control token in `text`, so that model-written text cannot end a turn or open another.

        `<|im_end|>` becomes `< |im_end|>`: still readable, no longer one special token.
        """
        for token in self._control_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def with_prompt_ids(problems: Sequence[Problem], chat: Chat, max_tokens: int) -> list[Problem]:
    """The problems with the token ids of their prompts.

    Raises:
        UserError: a prompt is longer than `data.max_prompt_tokens`.
    """
    tokenized = [replace(problem, prompt_ids=chat.prompt_ids(problem.messages)) for problem in problems]
    for problem in tokenized:
        if len(problem.prompt_ids) > max_tokens:
            raise UserError(
                f"problem {problem.id!r} has a prompt of {len(problem.prompt_ids)} tokens, over "
                f"data.max_prompt_tokens={max_tokens}: raise the limit or remove the problem"
            )
    return tokenized
