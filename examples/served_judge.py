"""A judge that is served, with Python's own HTTP server: `python examples/served_judge.py 8000`.

A config names it, and problems name its task (`"task": "words"`):

    verifier:
      http: {words: {url: "http://127.0.0.1:8000/verdict", seconds: 10, token_env: JUDGE_TOKEN}}

It asks nothing of this package: any server that answers such requests will do. docs/verifiers.md has the fields.
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Judge(BaseHTTPRequestHandler):
    """Reward: the share of the words of the answer that the response contains."""

    def do_POST(self) -> None:
        """One verdict a request."""
        token = os.environ.get("JUDGE_TOKEN")
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            self._answer(401, {"error": "the token is wrong"})
            return
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        missing = [word for word in asked["answer"] if word not in asked["response"].lower()]
        reward = 1.0 - len(missing) / len(asked["answer"])
        self._answer(200, {"reward": reward, "feedback": f"Not mentioned: {', '.join(missing)}." if missing else ""})

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Judge).serve_forever()
