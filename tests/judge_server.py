"""Test support: a judge behind OpenAI's chat completions, on a real socket, that judges as a script says.

`word(messages)` gives its judgement, or a status to refuse with. It reads the request as `judge_prompts.py` writes it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Messages = list[dict[str, str]]
Word = Callable[[Messages], "str | int"]
_QUOTED = re.compile(r"=== ([^\n]+) \((\w{8})\) ===\n(.*?)\n=== end \(\2\) ===", re.DOTALL)


@dataclass
class JudgeServer:
    """Change `word` while it runs."""

    word: Word
    port: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    asking: int = 0
    most_asking: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@contextmanager
def judging(word: Word) -> Iterator[JudgeServer]:
    """A judge that listens until the block is left."""
    judge = JudgeServer(word)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.headers.append({name.lower(): value for name, value in self.headers.items()})
                judge.bodies.append(body)
                judge.asking += 1
                judge.most_asking = max(judge.most_asking, judge.asking)
            said = judge.word(body["messages"]) if self.path == "/v1/chat/completions" else 404
            with judge.lock:
                judge.asking -= 1
            if isinstance(said, int):
                self._send(said, {"error": {"message": f"scripted {said}", "code": said}})
            else:
                message = {"role": "assistant", "content": said}
                self._send(200, {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})

        def _send(self, status: int, body: dict[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        judge.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield judge
        finally:
            server.shutdown()
            thread.join()


def answers_in(messages: Messages) -> list[str]:
    """The last answer of each assistant in a request, in the order shown; one where a single one is marked."""
    last: dict[str, str] = {}
    for title, _, text in _QUOTED.findall(messages[1]["content"]):
        name = title.partition(",")[0]
        if "ASSISTANT" in name and not name.startswith("THE PERSON"):
            last[name] = text
    return list(last.values())


def prefers_longer(messages: Messages) -> str:
    """Marks an answer by its length (a mark for ten characters), and chooses the longer of two."""
    answers = answers_in(messages)
    if len(answers) == 1:
        return f"I count.\nSCORE: {min(10, max(1, len(answers[0]) // 10))}"
    one, other = map(len, answers)
    return f"I count.\nBETTER: {'TIE' if one == other else 1 if one > other else 2}"


def always_first(messages: Messages) -> str:
    """The mark 5, and the first of two."""
    return "SCORE: 5" if len(answers_in(messages)) == 1 else "BETTER: 1"
