"""A small HTTP server that answers as vLLM does, with a real model, and misbehaves when a test asks it to."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mopd_nemo.chat import Chat
from mopd_nemo.engines.models import load_tokenizer

Json = dict[str, Any]


class ScriptedServer:
    """Serves the model of a directory under the name `tiny`, from the block's begin to its end.

    Args:
        max_logprobs: largest `prompt_logprobs`.
        api_key: refuse requests without it.
    """

    def __init__(self, model: Path, *, max_logprobs: int = 200, max_model_len: int = 4096, api_key: str = "") -> None:
        self.chat = Chat(load_tokenizer(str(model), key="model.path"))
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._max_logprobs, self._max_model_len, self._api_key = max_logprobs, max_model_len, api_key
        self.asked: list[list[int]] = []
        """Prompts of all completions so far."""
        self.statuses: list[int] = []
        """Given to the next completions, in place of answers."""
        self.spoil: Callable[[Json], Any] = lambda answer: None
        """Changes an answer, or gives another in its place."""
        self.before: Callable[[], None] = lambda: None
        """Called before each completion."""
        self.highest = 0
        """Most completions at a time."""
        self.slow = 0.0
        """Seconds that a completion takes beside its computation."""
        self._now = 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Like a killed process: no more connections, and those that are open break."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def completion(self, body: Json) -> tuple[int, Json]:
        ids, k = body["prompt"], body["prompt_logprobs"]
        assert body["model"] == "tiny" and body["temperature"] == 1.0
        if k > self._max_logprobs:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self._max_logprobs}"
            return 400, {"error": {"message": message, "code": 400}}
        if max(ids) >= self._model.config.vocab_size:
            return 400, {"error": {"message": f"Token id {max(ids)} is out of vocabulary", "code": 400}}
        with torch.no_grad():
            logprobs_TV = self._model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        positions: list[Json | None] = [None]
        for row_V, own in zip(logprobs_TV[:-1], ids[1:], strict=True):
            rank = int((row_V >= row_V[own]).sum())
            entries = {str(own): {"logprob": row_V[own].item(), "rank": rank, "decoded_token": "?"}}
            top = row_V.topk(k) if k else None
            for number, (value, index) in enumerate(zip(*top, strict=True) if top else (), start=1):
                entries[str(index.item())] = {"logprob": value.item(), "rank": number, "decoded_token": "?"}
            positions.append(entries)
        return 200, {"choices": [{"prompt_logprobs": positions, "prompt_token_ids": ids, "text": "?"}]}

    def _answer(self, path: str, body: Json, authorization: str) -> tuple[int, Any]:
        if self._api_key and authorization != f"Bearer {self._api_key}":
            return 401, {"error": f"Unauthorized: {authorization}"}
        match path:
            case "/v1/models":
                return 200, {"data": [{"id": "tiny", "max_model_len": self._max_model_len}]}
            case "/tokenize":
                return 200, {"tokens": self.chat.encode(body["prompt"])}
            case "/detokenize":
                return 200, {"prompt": self.chat.decode(body["tokens"], skip_special_tokens=False)}
            case "/v1/completions":
                return self._completed(body)
        return 404, {"detail": "Not Found"}

    def _completed(self, body: Json) -> tuple[int, Any]:
        with self._lock:
            self.asked.append(body["prompt"])
            self._now += 1
            self.highest = max(self.highest, self._now)
            status = self.statuses.pop(0) if self.statuses else 200
        try:
            self.before()
            time.sleep(self.slow)
            if status != 200:
                return status, {"error": {"message": "the script says so"}}
            code, answer = self.completion(body)
            spoilt = self.spoil(answer) if code == 200 else None
            return code, answer if spoilt is None else spoilt
        finally:
            with self._lock:
                self._now -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                server._sockets.add(self.connection)

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                status, answer = server._answer(self.path, body, self.headers.get("Authorization", ""))
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the server has died meanwhile
                    self.close_connection = True

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler
