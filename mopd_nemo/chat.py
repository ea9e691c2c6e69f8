"""The chat format: messages to token ids, ids to text, and thinking blocks. Nothing else applies a chat template."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mopd_nemo.config import UserError
from mopd_nemo.types import Message, Problem

OPEN, CLOSE = "<think>", "</think>"
"""The tags of a thinking block."""
PART_OF_CHARACTER = "\ufffd"
"""What a decoder writes for the bytes of a character that lost its others to a cut."""
_MOST_PARTS = 8
"""Tokens that may make up one character."""
_MARKER = re.compile(r"<[^\s<>]+>|\[[A-Z_/]+\]")
"""Form of control tokens that a tokenizer may not flag as special: `<｜User｜>`, `[INST]`."""


class Chat:
    """A Hugging Face tokenizer with a chat template.

    Args:
        tokenizer: any `PreTrainedTokenizerBase` with a chat template and an end-of-sequence token.
        template_kwargs: passed to the chat template, e.g. `{"enable_thinking": False}`.
        end_tokens: tokens that end a response beside the tokenizer's own end-of-sequence token.
        source: where the tokenizer came from, named in errors.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        end_tokens: Sequence[str] = (),
        source: str = "model",
    ) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"{source}: the tokenizer has no chat template; use an instruction-tuned model or add a chat_template"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"{source}: the tokenizer has no eos_token; set one in tokenizer_config.json")
        self.tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        self._source = source
        self._control_tokens = _control_tokens(tokenizer)
        self.end_ids = frozenset({tokenizer.eos_token_id, *(self._end_id(token) for token in end_tokens)})
        """Tokens that end a response."""

    @property
    def pad_id(self) -> int:
        """Id of padding, which is never attended to."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The templated prompt, ending with the assistant header.

        Raises:
            UserError: the template refuses the messages.
        """
        return self._rendered(messages, add_generation_prompt=True)

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of `prompt_text`."""
        return self.encode(self.prompt_text(messages))

    def check_reads(self, roles: Sequence[str]) -> None:
        """Refuse a template that leaves out what the user or the system says: every prompt would then be the same.

        Args:
            roles: of a prompt's messages, in order.

        Raises:
            UserError: a turn's text is not in the prompt.
        """
        messages = [Message(role=role, content=f"TURN{number}TEXT") for number, role in enumerate(roles)]
        text = self.prompt_text(messages)
        for message in reversed(messages):
            if message["role"] != "assistant" and message["content"] not in text:
                raise UserError(
                    f"the chat template of {self._source} leaves out the text of the {message['role']} turn "
                    f"(roles {', '.join(roles)}): mend chat_template, or write that text into the user turn of the rows"
                )

    def template_ids(self) -> frozenset[int]:
        """Tokens of a short prompt, the template's own among them; none if the template refuses a lone user turn."""
        try:
            return frozenset(self.prompt_ids([Message(role="user", content="")]))
        except UserError:
            return frozenset()

    def check_end_of_turn(self, end_ids: Collection[int]) -> None:
        """Refuse a model whose responses would never end: its template closes turns with a token that is no end token.

        Args:
            end_ids: all tokens that end a response.

        Raises:
            UserError: the model is of this kind.
        """
        answer = "ANSWER"
        try:
            turns = [Message(role="user", content="QUESTION"), Message(role="assistant", content=answer)]
            closing = self._rendered(turns, add_generation_prompt=False).rpartition(answer)[2].lstrip()
        except UserError:
            return  # the template renders no assistant turn, so its end is unknown
        ids = self.encode(closing)
        token = self.decode(ids[:1], skip_special_tokens=False)
        if token not in self._control_tokens or ids[0] in end_ids:
            return
        ends = ", ".join(repr(self.decode([index], skip_special_tokens=False)) for index in sorted(end_ids))
        raise UserError(
            f"{self._source}: the chat template ends turns with {token!r}, but responses end with {ends}: every "
            f"response would run to rollout.max_response_tokens. Add it with model.end_tokens=['{token}'], or use the "
            "instruction-tuned model"
        )

    def _rendered(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._template_kwargs,
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            roles = ", ".join(message["role"] for message in messages)
            remedy = "give the tokenizer a template that takes them, or change the roles of the rows"
            if messages[0]["role"] == "system":
                remedy = "write the system text into the user turn of the rows, or use a template with a system role"
            raise UserError(
                f"the chat template of {self._source} refuses messages with the roles {roles}: "
                f"{str(error) or type(error).__name__}: {remedy}"
            ) from error

    def _end_id(self, token: str) -> int:
        ids = self.encode(token)
        if len(ids) != 1:
            raise UserError(f"model.end_tokens={token!r}: not one token of {self._source}")
        return ids[0]

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids. Control tokens in the text are encoded as such, and none are added."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token; joined, they are the text of all, with special tokens.

        A character that several tokens make up is the text of its last one, and theirs is empty.
        """
        texts: list[str] = []
        before: Sequence[int] = ()
        start = 0
        for end in range(1, len(ids) + 1):
            context = self.decode(before, skip_special_tokens=False)
            text = self.decode([*before, *ids[start:end]], skip_special_tokens=False)
            if text.endswith(PART_OF_CHARACTER) and end < min(len(ids), start + _MOST_PARTS):
                texts.append("")
                continue
            texts.append(text[len(context) :])
            before, start = ids[start:end], end
        return texts

    def escape_control_tokens(self, text: str) -> str:
        """Break up every control token in `text`, so that text cannot end a turn or open another.

        `<|im_end|>` becomes `< |im_end|>`: still readable, no longer one token.
        """
        for token in self._control_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


def _control_tokens(tokenizer: Any) -> list[str]:
    """The tokenizer's control tokens, longest first.

    They are its listed special tokens, tokens that `tokenizer.json` flags as special (Llama's role markers are in no
    list), and added tokens in brackets. Thinking tags are not: they occur in responses, and are stripped from peers.
    """
    added = tokenizer.added_tokens_decoder.values()
    flagged = {token.content for token in added if token.special or _MARKER.fullmatch(token.content)}
    tokens = {token for token in {*tokenizer.all_special_tokens, *flagged} if len(token) > 1}
    return sorted(tokens - {OPEN, CLOSE}, key=lambda token: (-len(token), token))


def with_prompt_ids(
    problems: Sequence[Problem], chat: Chat, max_tokens: int, *, escape_control_tokens: bool = True
) -> list[Problem]:
    """The problems with the token ids of their prompts.

    Args:
        escape_control_tokens: break up control tokens in the text of the problems.

    Raises:
        UserError: the template refuses a problem's messages or leaves some out, or a prompt is empty or longer than
            `data.max_prompt_tokens`.
    """
    tokenized = []
    read: set[tuple[str, ...]] = set()
    for problem in problems:
        messages = problem.messages
        if escape_control_tokens:
            messages = tuple(
                Message(role=m["role"], content=chat.escape_control_tokens(m["content"])) for m in messages
            )
        roles = tuple(message["role"] for message in messages)
        try:
            ids = chat.prompt_ids(messages)
            if roles not in read:
                chat.check_reads(roles)
        except UserError as error:
            raise UserError(f"problem {problem.id!r}: {error}") from error
        read.add(roles)
        if len(ids) > max_tokens:
            raise UserError(
                f"problem {problem.id!r} has a prompt of {len(ids)} tokens, over data.max_prompt_tokens={max_tokens}: "
                "raise the limit or remove the problem"
            )
        tokenized.append(replace(problem, messages=messages, prompt_ids=ids))
    return tokenized


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thinking block, as templates of thinking-only models do."""
    return prompt.rfind(OPEN) > prompt.rfind(CLOSE)


def strip_thinking(text: str, *, opened_in_prompt: bool = False) -> str:
    """Remove every thinking block: closed ones, an unclosed one, and one whose opening tag sits in the prompt.

    A response that never leaves its thinking block becomes the empty string.
    """
    if opened_in_prompt and text.find(CLOSE) == -1:
        return ""
    close, open_ = text.find(CLOSE), text.find(OPEN)
    if close != -1 and (open_ == -1 or close < open_):
        text = text[close + len(CLOSE) :]
    text = re.sub(f"{OPEN}.*?({CLOSE}|$)", "", text, flags=re.DOTALL)
    return text.strip()


def after_thinking(text: str) -> str:
    """The answer in a response: the text after the last closed thinking block, before one that is still open.

    If the opening tag is in the prompt, prepend it to the response.
    """
    return text.rpartition(CLOSE)[2].partition(OPEN)[0]
