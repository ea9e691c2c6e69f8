"""A teacher that runs elsewhere: requests to its servers, spread over replicas, and what happens when one fails."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import torch

from mopd_nemo.chat import Chat
from mopd_nemo.config import Config, TeacherConfig, TeacherError, UserError
from mopd_nemo.config.checks import teacher_prompt
from mopd_nemo.config.teacher import key_of
from mopd_nemo.engines.base import SHOWN_EVERY, Progress
from mopd_nemo.engines.serving import SERVINGS, Answer, AnswerError, Json, Question
from mopd_nemo.losses.logits import TopK
from mopd_nemo.types import TrainExample

logger = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it would say every request

FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before a request is sent again: the first time, and at most. Each wait is twice the one before."""
CONNECTING = 10.0
"""Seconds within which a server must accept a connection."""
BUSY = frozenset({408, 429})
"""Status codes that, like all from 500 on, ask for another try."""
PROBE_TOKENS = 32
"""Length of the request that tries a server out."""
SAME_MODEL = 0.5
"""Nats between the log-probabilities of two replicas, on average over a few tokens. Rounding is far less, another model
far more."""
PROBE_TEXTS = (
    'The answer is 42.\n\n  def f(x):\n\treturn x ** 2  # it\'s "quoted"\n',
    "1234567890 3.14159 -1e-05 1,000,000 0x1F",
    "\\frac{a}{b} ≤ √2 → ∀x ∈ ℝ",
    "naïve Über русский 中文 عرب हि 🙂",
    " leading, trailing and   inner spaces  ",
)
"""Texts that both tokenizers must read alike, beside those of single tokens."""
PROBED = 256
"""Tokens, spread over the vocabulary, that both tokenizers must write alike."""


_READING = threading.Lock()
"""An answer of tens of megabytes is ten times as large once it is read, so one is read at a time."""


Teaching = Callable[[Progress | None], tuple[list[TopK], dict[str, float]]]
"""Waits for what servers say of some examples, the likeliest tokens or the sampled ones, and gives it with metrics.
Raises `TeacherError` where no server answers any more, or an answer cannot be used."""


class _GoneError(Exception):
    """A server does not answer any more."""


class ServedTeacher:
    """Asks the servers of one teacher.

    The constructor asks every server what it serves, how it reads text, and one small question.

    Args:
        config: of the run.
        name: of the teacher among several; empty for a single one.
        chat: the student's.
        vocab_size: of the student's head.

    Raises:
        UserError: a server is not there, refuses, or serves a model with another vocabulary.
    """

    def __init__(self, config: Config, name: str, chat: Chat, vocab_size: int) -> None:
        self._config, key = config.every_teacher[name], key_of(name)
        self._longest = (*teacher_prompt(config), config.rollout.max_response_tokens)
        self._k = config.divergence.k if config.divergence.support == "teacher_topk" else 0
        """Of the likeliest tokens, how many to ask for; 0: for the sampled token alone."""
        self._vocab_size = vocab_size
        if self._k > vocab_size:
            raise UserError(f"divergence.k={self._k} is more than the {vocab_size} tokens of the vocabulary: lower it")
        secret = _secret(self._config, key)
        self._replicas = [_Replica(url, self._config, secret) for url in self._config.urls]
        for replica in self._replicas:
            try:
                self._check(replica, key, chat)
            except (httpx.HTTPError, _GoneError, AnswerError) as error:
                raise UserError(
                    f"{key}.urls: {replica.url} {replica.clean(error)}: start the server (docs/teachers.md), or "
                    "correct the address"
                ) from None  # what a library says of a request might hold the key
        first, *others = self._replicas
        for other in others:
            gap = sum(abs(a - b) for a, b in zip(first.own, other.own, strict=True)) / len(first.own)
            if gap > SAME_MODEL:
                raise UserError(
                    f"{key}.urls: {first.url} and {other.url} serve different models: their log-probabilities of the "
                    f"same tokens are {gap:.2g} nats apart; several models are several teachers (docs/teachers.md)"
                )
        self.retries = 0
        """Requests that were sent again so far."""

    @property
    def num_replicas(self) -> int:
        """Servers that still answer."""
        return sum(not replica.gone.is_set() for replica in self._replicas)

    @contextmanager
    def teaching(self, examples: Sequence[TrainExample]) -> Iterator[Teaching]:
        """Inside, the servers are asked about examples that all have a teacher prompt."""
        with self.asking([(e.teacher_prompt_ids or (), e.response_ids) for e in examples]) as asking:

            def answers(on_progress: Progress | None) -> tuple[list[TopK], dict[str, float]]:
                told = asking.wait(on_progress)
                found = [TopK(*(torch.tensor(part) for part in (one.ids, one.logprobs, one.own))) for one in told]
                return found, {"score/retries": asking.retries, "score/replicas": self.num_replicas}

            yield answers

    @contextmanager
    def asking(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[_Asking]:
        """Inside, the servers are asked about the responses in (prompt, response) sequences.

        At the end requests without an answer are given up.
        """
        questions = [
            Question((*prompt, *response), len(prompt), self._k, self._vocab_size) for prompt, response in sequences
        ]
        asking = _Asking(questions)
        for replica in self._replicas:
            for _ in range(min(self._config.max_in_flight, len(questions))):
                asking.start(replica)
        try:
            yield asking
        finally:
            asking.stopped.set()
            self.retries += asking.retries

    def _check(self, replica: _Replica, key: str, chat: Chat) -> None:
        replica.model = self._served_model(replica, key)
        _check_tokenizer(replica, key, chat)
        size = self._vocab_size
        ids = tuple(round(place * (size - 1) / (PROBE_TOKENS - 1)) for place in range(PROBE_TOKENS))
        response = replica.send(Question(ids, PROBE_TOKENS // 2, self._k, size))
        if not response.is_success:
            message = replica.message(response)
            remedy = replica.serving.refusal(message, self._k) or "see docs/teachers.md for how to start it"
            raise UserError(f"{key}.urls: {replica.url} refuses a request with {message}: {remedy}")
        replica.own = replica.read(response, Question(ids, PROBE_TOKENS // 2, self._k, size)).own
        beyond = replica.send(Question((*ids[:-1], size), PROBE_TOKENS // 2, self._k, size))
        if beyond.is_success:
            raise UserError(
                f"{key}.urls: the model of {replica.url} has more tokens than the {size} of the student: choose a "
                "teacher with the same vocab_size"
            )

    def _served_model(self, replica: _Replica, key: str) -> str:
        """The name of the model to ask for, which is there and reads enough tokens."""
        found = {card["id"]: card for card in replica.json("GET", "v1/models").get("data", [])}
        name = self._config.model or (next(iter(found)) if len(found) == 1 else None)
        if name not in found:
            raise UserError(
                f"{key}.model={self._config.model!r}: {replica.url} serves {', '.join(found) or 'no model'}: name one"
            )
        limit = found[name].get("max_model_len")
        prompt_key, prompt, response = self._longest
        if limit is not None and prompt + response + 1 > limit:  # a server always generates a token
            raise UserError(
                f"{prompt_key}={prompt} + rollout.max_response_tokens={response} + 1 exceeds the {limit} tokens that "
                f"{replica.url} reads: start it with --max-model-len {prompt + response + 1}, or lower one of them"
            )
        return name


class _Asking:
    """Questions on their way: threads take one after the other, and give it back when their server is gone."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._questions = questions
        longest_first = sorted(range(len(questions)), key=lambda i: -len(questions[i].ids))
        self._todo = deque(longest_first)
        self._answers: dict[int, Answer] = {}
        self._error: BaseException | None = None
        self._gone: dict[str, str] = {}
        """Servers that no longer answer, and why."""
        self._threads = 0
        self._changed = threading.Condition()
        self.stopped = threading.Event()
        self.retries = 0

    def start(self, replica: _Replica) -> None:
        """One more request at a time to a server, unless it is gone."""
        if replica.gone.is_set():
            self._gone[replica.url] = replica.reason
            return
        with self._changed:
            self._threads += 1
        threading.Thread(target=self._work, args=(replica,), name="teacher", daemon=True).start()

    def wait(self, on_progress: Progress | None) -> list[Answer]:
        """All answers, in order."""
        total = len(self._questions)
        with self._changed:
            while len(self._answers) < total:
                if self._error is not None:
                    raise self._error
                if not self._threads:
                    raise TeacherError("; ".join(f"{url} {reason}" for url, reason in self._gone.items()))
                self._changed.wait(SHOWN_EVERY)
                if on_progress:
                    on_progress(len(self._answers) / total)
        return [self._answers[number] for number in range(total)]

    def _work(self, replica: _Replica) -> None:
        number: int | None = None
        try:
            while (number := self._next()) is not None:
                answer = replica.ask(self._questions[number], self._wait)
                with self._changed:
                    self._answers[number] = answer
                    self._changed.notify_all()
        except _GoneError:
            with self._changed:
                self._gone[replica.url] = replica.reason
                if number is not None:
                    self._todo.append(number)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._threads -= 1
                self._changed.notify_all()

    def _next(self) -> int | None:
        """The number of a question that nobody asks; None: all are answered."""
        with self._changed:
            while not self._todo and len(self._answers) < len(self._questions) and not self.stopped.is_set():
                self._changed.wait(SHOWN_EVERY)  # a server may go, and leave its questions to others
            return self._todo.popleft() if self._todo and not self.stopped.is_set() else None

    def _wait(self, seconds: float) -> None:
        with self._changed:
            self.retries += 1
        if self.stopped.wait(seconds):
            raise _GoneError


class _Replica:
    """One server."""

    def __init__(self, url: str, config: TeacherConfig, secret: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.serving = SERVINGS[config.server]
        self.model = ""
        self.own: list[float] = []
        """What it says of the tokens that tried it out."""
        self.gone = threading.Event()
        self.reason = ""
        self._leaving = threading.Lock()
        self._retries = config.retries
        self._secret = secret
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {secret}"} if secret else {},
            timeout=httpx.Timeout(config.timeout, connect=CONNECTING),
            limits=httpx.Limits(max_connections=config.max_in_flight, max_keepalive_connections=config.max_in_flight),
        )

    def ask(self, question: Question, wait: Callable[[float], None]) -> Answer:
        """The answer to a question, asked again as often as the settings say.

        Args:
            wait: for some seconds, before the next try.

        Raises:
            _GoneError: this server answers nobody any more.
            TeacherError: it refuses the question, or its answer cannot be used.
        """
        for attempt in range(self._retries + 1):
            if self.gone.is_set():
                raise _GoneError
            pause = 0.0
            try:
                response = self.send(question)
            except httpx.TransportError as error:
                self.reason = self.clean(error)
            else:
                if response.is_success:
                    return self._usable(response, question)
                self.reason = f"answers {self.message(response)}"
                if response.status_code not in BUSY and response.status_code < 500:
                    raise TeacherError(f"{self.url} {self.reason}")
                pause = _seconds(response.headers.get("retry-after"))
            if attempt < self._retries:
                wait(min(max(FIRST_WAIT * 2**attempt, pause), LONGEST_WAIT))
        with self._leaving:
            if not self.gone.is_set():
                self.gone.set()
                logger.warning("teacher at %s: %s; it is left out from here on", self.url, self.reason)
        raise _GoneError

    def send(self, question: Question) -> httpx.Response:
        """Send a question once."""
        path, body = self.serving.question(self.model, question)
        return self._client.post(path, json=body)

    def json(self, method: str, path: str, body: Json | None = None) -> Json:
        """The answer to a request of another kind."""
        response = self._client.request(method, path, json=body)
        if not response.is_success:
            raise _GoneError(f"answers {self.message(response)}")
        return self._decoded(response)

    def read(self, response: httpx.Response, question: Question) -> Answer:
        """The answer in a response."""
        return self.serving.answer(self._decoded(response), question)

    def message(self, response: httpx.Response) -> str:
        """What the server says of a request that it does not answer."""
        try:
            body = response.json()
            error = body.get("error", body)
            said = error.get("message", error) if isinstance(error, dict) else error
        except (ValueError, AttributeError):
            said = response.text
        return self.clean(f"{response.status_code} ({' '.join(str(said).split())[:300]})")

    def clean(self, said: object) -> str:
        """Words of a library or a server, without the key."""
        text = str(said) or type(said).__name__
        return text.replace(self._secret, "(the key)") if self._secret else text

    def _usable(self, response: httpx.Response, question: Question) -> Answer:
        try:
            with _READING:
                return self.read(response, question)
        except AnswerError as error:
            raise TeacherError(f"the answer of {self.url} cannot be used: {self.clean(error)}") from None

    def _decoded(self, response: httpx.Response) -> Json:
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise AnswerError("it is not JSON")
        return body


def _check_tokenizer(replica: _Replica, key: str, chat: Chat) -> None:
    """The server reads texts, and writes tokens, as the student's tokenizer does.

    The texts are of many kinds, and those of added tokens. The tokens are spread over the vocabulary. So this finds
    another tokenizer; it does not prove that two vocabularies are equal in every entry.
    """
    vocabulary = chat.tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1
    ids = sorted({place * (size - 1) // (PROBED - 1) for place in range(PROBED)} & set(vocabulary.values()))
    serving = replica.serving
    body = {"model": replica.model, "tokens": ids, "skip_special_tokens": False}
    written = replica.json("POST", serving.detokenize, body).get(serving.written)
    spread = chat.decode(ids, skip_special_tokens=False)
    added = "".join(list(chat.tokenizer.get_added_vocab())[:PROBED])
    pairs: list[tuple[Any, Any]] = [(written, spread)]
    for text in (*PROBE_TEXTS, added, spread):
        body = {"model": replica.model, "prompt": text, "add_special_tokens": False}
        read = replica.json("POST", serving.tokenize, body).get("tokens")
        pairs.append((None if read is None else tuple(read), chat.encode(text)))
    for theirs, ours in pairs:
        if theirs != ours:
            raise UserError(
                f"{key}.urls: the tokenizer of {replica.url} differs from that of the student: it gives "
                f"{str(theirs)[:60]!r} where the student's gives {str(ours)[:60]!r}; token-level distillation needs "
                "one vocabulary: choose a teacher of the student's family"
            )


def _secret(config: TeacherConfig, key: str) -> str | None:
    """The API key, if there is one."""
    secret = os.environ.get(config.api_key_env, "").strip()
    if not secret and config.api_key_env != TeacherConfig.model_fields["api_key_env"].default:
        raise UserError(f"{key}.api_key_env={config.api_key_env}: this environment variable is not set: export it")
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(f"{key}.api_key_env={config.api_key_env}: its value is no API key: it holds other than ASCII")
    return secret or None


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; 0 where it gives a date."""
    return float(header) if header and header.isdigit() else 0.0
