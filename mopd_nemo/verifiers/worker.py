"""A worker process: judges one response at a time until its parent goes away.

    python -m mopd_nemo.verifiers.worker CHANNEL LIFELINE CONFIG TASKS

CHANNEL is a socket for JSON messages, LIFELINE a pipe that closes when the parent ends, however it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from mopd_nemo.config.verifiers import VerifierConfig
from mopd_nemo.verifiers import make_verifier
from mopd_nemo.verifiers.base import Verifier

_MEMORY_BYTES = 8 << 30
"""Of the worker itself: an answer such as 9^(9^(9^9)) must not take the machine's memory before its time is over."""


def main() -> None:
    """Make the verifiers, say so, and judge."""
    channel, lifeline, config_json, tasks = sys.argv[1:]
    _end_with(int(lifeline))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, hard))
    connection = Connection(int(channel))
    config = VerifierConfig.model_validate_json(config_json)
    try:
        verifiers = {task: make_verifier(task, config) for task in tasks.split(",")}
    except Exception as error:
        connection.send_bytes(json.dumps({"error": _describe(error)}).encode())
        return
    connection.send_bytes(json.dumps({"ready": True}).encode())
    while True:
        try:
            request = json.loads(connection.recv_bytes()) | {"answer": json.loads(connection.recv_bytes())}
        except EOFError:
            break
        connection.send_bytes(json.dumps(_judge(verifiers, request)).encode())
    for verifier in verifiers.values():
        verifier.close()


def _judge(verifiers: dict[str, Verifier], request: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked: judge a response, check the gold answer, or say whether two found answers are the same."""
    verifier = verifiers[request["task"]]
    try:
        match request["ask"]:
            case "gold":
                verifier.check_gold(request["answer"])
                return {}
            case "same":
                return {"same": verifier.same(*request["answer"])}
        verdict = verifier.judge(request["response"], request["answer"], request["finished"])
    except Exception as error:  # a fault of the verifier must not be taken for a failure of the model
        return {"error": _describe(error)}
    return asdict(verdict)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _end_with(lifeline: int) -> None:
    """Have the kernel end this process when the pipe closes: a thread would wait for a computation that never ends."""
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)  # SIGIO, which ends a process by default
    try:
        if os.read(lifeline, 1) == b"":
            sys.exit(1)  # it was closed already
    except BlockingIOError:
        pass


if __name__ == "__main__":
    main()
