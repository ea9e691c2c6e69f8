"""A judge that is served over HTTP: one POST of JSON a response, one JSON verdict back.

Whatever goes wrong on the way is a failure of the judge, and never one of the model.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from mopd_nemo.config import UserError
from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.types import Outcome, Verdict
from mopd_nemo.verifiers.base import MAX_FEEDBACK, Verifier, as_verdict, shorten

_PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses after which another try may succeed."""
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_ASKED = 0.5, 8.0, 60.0
"""Seconds before the second try, before any, and before one that the server asks to wait for."""
_MAX_BYTES = 1 << 20
"""Of an answer."""


class JudgeError(Exception):
    """The judge gave no verdict."""


class _PassingError(JudgeError):
    """Another try may succeed, after `wait` seconds if the server says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class ServedVerifier(Verifier):
    """Asks the server that `verifier.http.TASK` names. Threads may share it."""

    needs_worker = False

    def __init__(self, config: VerifierConfig, task: str) -> None:
        super().__init__(config)
        self._task, self._http = task, config.http[task]
        self._url = urlsplit(self._http.url)
        self._stopped = threading.Event()
        key = f"verifier.http.{task}"
        self._token = os.environ.get(self._http.token_env, "") if self._http.token_env else ""
        if self._http.token_env and not self._token:
            raise UserError(f"{key}.token_env={self._http.token_env}: this environment variable is not set")
        try:
            socket.create_connection(self._place, timeout=self._http.seconds).close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{key}.url={self._http.url}: nobody answers there: {reason}; start the judge") from error

    @classmethod
    def of(cls, task: str, config: VerifierConfig) -> Verifier:
        """The judge that is configured for this task."""
        return cls(config, task)

    def judge(self, response: str, answer: Any, finished: bool) -> Verdict:
        """Ask, and ask again where that may help.

        Raises:
            JudgeError: there is no verdict.
        """
        request = {"task": self._task, "response": response, "answer": answer, "finished": finished}
        body = json.dumps(request).encode()
        wait = _FIRST_WAIT
        for tried in range(1, self._http.retries + 2):
            try:
                return self._verdict(self._ask(body))
            except _PassingError as error:
                last = tried == self._http.retries + 1
                if last or self._stopped.wait(min(wait if error.wait is None else error.wait, _LONGEST_ASKED)):
                    raise JudgeError(f"{self._where}: {self._hidden(str(error))}; tried {tried} times") from error
                wait = min(2 * wait, _LONGEST_WAIT)
            except (JudgeError, ValueError, TypeError) as error:
                raise JudgeError(f"{self._where}: {self._hidden(str(error))}") from error
        raise AssertionError

    def close(self) -> None:
        """Begin no further try."""
        self._stopped.set()

    @property
    def _where(self) -> str:
        return f"verifier.http.{self._task}.url={self._http.url}"

    @property
    def _place(self) -> tuple[str, int]:
        return self._url.hostname or "", self._url.port or (443 if self._url.scheme == "https" else 80)

    def _hidden(self, text: str) -> str:
        """Text that may come from the server, without the token."""
        return shorten(text.replace(self._token, "[token]") if self._token else text, 300)

    def _ask(self, body: bytes) -> bytes:
        """The body of one answer. The connection is cut when the time is up, whatever it waits for."""
        kind = HTTPSConnection if self._url.scheme == "https" else HTTPConnection
        connection = kind(*self._place, timeout=self._http.seconds)
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self._token}"} if self._token else {}
        )
        ends = time.monotonic() + self._http.seconds
        cut: threading.Timer | None = None
        try:
            connection.connect()
            cut = threading.Timer(max(ends - time.monotonic(), 0.0), _cut, [connection.sock])
            cut.start()
            connection.request("POST", self._url.path or "/", body, headers)
            answer = _body(connection.getresponse())
            if time.monotonic() >= ends:  # a connection that was cut may look like one that ended
                raise TimeoutError
            return answer
        except (OSError, HTTPException) as error:
            late = isinstance(error, TimeoutError) or time.monotonic() >= ends
            reason = f"no answer within {self._http.seconds:g} s" if late else f"{type(error).__name__}: {error}"
            raise _PassingError(reason) from error
        finally:
            if cut is not None:
                cut.cancel()
            connection.close()

    def _verdict(self, body: bytes) -> Verdict:
        """The verdict that an answer holds."""
        try:
            given = json.loads(body)
        except ValueError as error:
            raise JudgeError(f"its answer is no JSON: {body[:80]!r}") from error
        if not isinstance(given, dict):
            raise JudgeError(f"its answer is no JSON object: {body[:80]!r}")
        if given.get("error"):
            raise JudgeError(f"it says: {given['error']}")
        unknown = given.keys() - {"reward", "outcome", "feedback", "informative", "details", "error"}
        if unknown:
            raise JudgeError(f"its answer has unknown fields: {', '.join(sorted(unknown))}")
        reward = given.get("reward")
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            raise JudgeError(f"its answer has the reward {reward!r}, which is no number")
        verdict = as_verdict(reward, self._config.success_threshold)
        feedback, details = given.get("feedback", ""), given.get("details", {})
        if not isinstance(feedback, str) or not isinstance(details, dict):
            raise JudgeError("its answer has a feedback that is no text, or details that are no object")
        outcome = Outcome(given.get("outcome", verdict.outcome))
        if outcome is Outcome.VERIFIER_ERROR:
            raise JudgeError("it says verifier_error")
        informative = bool(given.get("informative", bool(feedback)))
        return Verdict(verdict.reward, outcome, shorten(feedback, MAX_FEEDBACK), details, informative)


def _body(response: HTTPResponse) -> bytes:
    if response.status in _PASSING:
        asked = response.headers.get("Retry-After", "")
        wait = float(asked) if asked.isdigit() else None
        raise _PassingError(f"status {response.status} {response.reason}", wait)
    if response.status != 200:
        raise JudgeError(f"status {response.status} {response.reason}")
    body = response.read(_MAX_BYTES + 1)
    if len(body) > _MAX_BYTES:
        raise JudgeError(f"its answer has more than {_MAX_BYTES} bytes")
    return body


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
