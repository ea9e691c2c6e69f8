"""What servers of a teacher are asked, and how their answers are read: vLLM's and SGLang's protocols, pure functions.

The answer to a request has, for each token of a response, what the model says of it after all tokens before it. It is
checked against the ids that were sent, token by token. SGLang's protocol follows its documentation and source; it has
not been tried against a server.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Json = dict[str, Any]
Row = tuple[list[tuple[int, float]], float]
"""The likeliest tokens with their log-probabilities, and that of the token itself."""
ROUNDING = 1e-3
"""By which the probabilities of a row may exceed 1 together, and a log-probability 0."""

IMPOSSIBLE = -9999.0
"""What vLLM writes for a log-probability of -infinity, which JSON lacks."""


class AnswerError(ValueError):
    """An answer that cannot be used. The message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Question:
    """Log-probabilities of the tokens of `ids` from position `start` on."""

    ids: tuple[int, ...]
    start: int
    k: int
    """How many of the likeliest tokens to tell at each position; 0: of the token itself alone."""
    vocab_size: int
    """Token ids are below it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One row for each token asked for."""

    ids: list[list[int]]
    """The k likeliest, likeliest first; with k = 0 the token itself."""
    logprobs: list[list[float]]
    """Of those, nats, normalised over the whole vocabulary."""
    own: list[float]
    """Of the token itself."""


class Serving(Protocol):
    """One software's protocol. Paths are relative to the server's address, bodies are JSON."""

    name: str
    tokenize: str
    """Path that reads a text, `prompt`, as `tokens`."""
    detokenize: str
    """Path that writes `tokens` as a text."""
    written: str
    """The field of that text."""

    def question(self, model: str, question: Question) -> tuple[str, Json]:
        """Path and body of a request."""
        ...

    def answer(self, body: Json, question: Question) -> Answer:
        """What the server said.

        Raises:
            AnswerError: something is missing, not a log-probability, or of other tokens than those asked for.
        """
        ...

    def refusal(self, message: str, k: int) -> str:
        """What to do about a request that the server refused with this message; empty: unknown."""
        ...


class Vllm:
    """`/v1/completions` with `prompt_logprobs`. The one token that it must generate is not read."""

    name = "vllm"
    tokenize, detokenize, written = "tokenize", "detokenize", "prompt"

    def question(self, model: str, question: Question) -> tuple[str, Json]:
        """Tokens in, log-probabilities of the prompt out. They are raw: the temperature does not change them."""
        return "v1/completions", {
            "model": model,
            "prompt": list(question.ids),
            "prompt_logprobs": question.k,
            "max_tokens": 1,
            "temperature": 1.0,
            "add_special_tokens": False,
            "return_token_ids": True,
        }

    def answer(self, body: Json, question: Question) -> Answer:
        """Each position is a mapping of token ids, of the k likeliest and of the token itself, with their ranks."""
        choice = _get(_get(body, "choices", list), 0, dict)
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and tuple(echoed) != question.ids:
            raise AnswerError(f"it scored other tokens than those sent: {_difference(echoed, question.ids)}")
        positions = _get(choice, "prompt_logprobs", list)
        if len(positions) != len(question.ids):
            raise AnswerError(
                f"it has log-probabilities of {len(positions)} tokens, and {len(question.ids)} were sent: the server "
                "has cut the prompt (--max-model-len) or left tokens out"
            )
        for place, position in enumerate(positions):
            # The first token has nothing before it. Every other is named, so that a shift shows in the prompt, too.
            if (position is None) != (place == 0) or (place and str(question.ids[place]) not in position):
                raise AnswerError(f"{_where(place, question)} has no log-probability of token {question.ids[place]}")
        rows = [self._row(positions[place], place, question) for place in range(question.start, len(question.ids))]
        return _answer(rows, question)

    def _row(self, position: Mapping[str, Any], place: int, question: Question) -> Row:
        where = _where(place, question)
        own = _logprob(_get(position, str(question.ids[place]), dict).get("logprob"), where)
        ranked = {}
        for token, entry in position.items():
            rank = entry.get("rank") if isinstance(entry, dict) else None
            if not isinstance(rank, int) or (rank > question.k and int(token) != question.ids[place]):
                raise AnswerError(f"{where}: token {token} has rank {rank}, and the {question.k} likeliest were asked")
            if rank <= question.k:
                ranked[rank] = int(token), _logprob(entry.get("logprob"), where)
        if sorted(ranked) != list(range(1, question.k + 1)):
            raise AnswerError(f"{where}: {len(ranked)} of the {question.k} likeliest tokens are there")
        return [ranked[rank] for rank in range(1, question.k + 1)], own

    def refusal(self, message: str, k: int) -> str:
        """vLLM gives 20 log-probabilities at most, unless it is told otherwise."""
        if "max allowed" in message and "logprobs" in message:
            return f"start the server with --max-logprobs {k} (or more), or lower divergence.k"
        return ""


class Sglang:
    """`/generate` with `return_logprob`."""

    name = "sglang"
    tokenize, detokenize, written = "v1/tokenize", "v1/detokenize", "text"

    def question(self, model: str, question: Question) -> tuple[str, Json]:
        """Log-probabilities begin at a position; that of the position itself is always missing."""
        return "generate", {
            "input_ids": list(question.ids),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": question.start - 1,
            "top_logprobs_num": question.k,
        }

    def answer(self, body: Json, question: Question) -> Answer:
        """Each position is [log-probability, id, text], and a list of such for the likeliest."""
        meta = _get(body, "meta_info", dict)
        own = _get(meta, "input_token_logprobs", list)[1:]
        tops = _get(meta, "input_top_logprobs", list)[1:] if question.k else [[]] * len(own)
        places = range(question.start, len(question.ids))
        if not len(own) == len(tops) == len(places):
            raise AnswerError(
                f"it has log-probabilities of {len(own)} tokens, {len(places)} were asked for: the server has cut the "
                "prompt (--context-length) or left tokens out"
            )
        rows: list[Row] = []
        for place, token, top in zip(places, own, tops, strict=True):
            where = _where(place, question)
            said, sent = _get(token, 1, int), question.ids[place]
            if said != sent and not (said == 0 and sent == question.vocab_size - 1):  # it writes the last token as 0
                raise AnswerError(f"{where} has a log-probability of token {said}, not of {sent}")
            if top is None or len(top) != question.k:
                raise AnswerError(f"{where}: {len(top or ())} of the {question.k} likeliest tokens are there")
            ranked = [(_get(entry, 1, int), _logprob(entry[0], where)) for entry in top]
            rows.append((ranked, _logprob(token[0], where)))
        return _answer(rows, question)

    def refusal(self, message: str, k: int) -> str:
        """It has no limit that one would have to raise."""
        return ""


SERVINGS: dict[str, Serving] = {serving.name: serving for serving in (Vllm(), Sglang())}
"""By `teacher.server`."""


def _answer(rows: Sequence[Row], question: Question) -> Answer:
    """Rows of the likeliest tokens and of the token itself, checked."""
    answer = Answer([], [], [])
    for place, (ranked, own) in enumerate(rows, start=question.start):
        where = _where(place, question)
        if not question.k:
            if own <= IMPOSSIBLE:
                raise AnswerError(f"{where}: token {question.ids[place]} has probability 0")
            ranked = [(question.ids[place], own)]
        ids, logprobs = [token for token, _ in ranked], [logprob for _, logprob in ranked]
        if sorted(logprobs, reverse=True) != logprobs or len(set(ids)) < len(ids):
            raise AnswerError(f"{where}: the likeliest tokens are out of order")
        if math.fsum(map(math.exp, logprobs)) > 1 + ROUNDING:
            raise AnswerError(f"{where}: probabilities add up to more than 1; these are no log-probabilities")
        if min(ids) < 0 or max(ids) >= question.vocab_size:
            raise AnswerError(f"{where}: token {max(ids)} is not one of the student's {question.vocab_size}")
        answer.ids.append(ids)
        answer.logprobs.append(logprobs)
        answer.own.append(own)
    return answer


def _logprob(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > ROUNDING:
        raise AnswerError(f"{where}: {value!r} is no log-probability")
    return min(float(value), 0.0)


def _get(values: Any, key: str | int, kind: type) -> Any:
    """A part of an answer that must be there."""
    try:
        found = values[key]
    except (KeyError, IndexError, TypeError):
        found = None
    if not isinstance(found, kind):
        raise AnswerError(f"it has no {key}")
    return found


def _where(place: int, question: Question) -> str:
    if place < question.start:
        return f"token {place} of the prompt"
    return f"token {place - question.start} of the response"


def _difference(echoed: Sequence[Any], sent: Sequence[int]) -> str:
    if len(echoed) != len(sent):
        return f"{len(echoed)} in place of {len(sent)}"
    place = next(i for i, (one, other) in enumerate(zip(echoed, sent, strict=True)) if one != other)
    return f"{echoed[place]} in place of {sent[place]} at position {place}"
