"""How a command reaches the product: the running server's HTTP API, or, where none runs, the same API in process.

Where it sits: `cli.py` asks `connect` for a `Client`; every command is then one request, so a command, a route and a
button do the same thing. A server announces itself in `DATA_DIR/server.json`.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from chat_app.settings import Settings
from feedback_store.bounded import load_json

ANNOUNCEMENT = "server.json"
IN_PROCESS = "http://zloop.in-process"
LOOK_EVERY_S = 0.3
PATIENCE = httpx.Timeout(3600, connect=5)  # an import or an evaluation takes minutes


class ApiRefused(Exception):
    """The API answered with an error; the message is its sentence."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        self.status = status
        self.body = body
        super().__init__(str(body.get("error", {}).get("message") or f"the server answered {status}"))


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that owns a data directory: process, its start time (unix s, against reused pids) and URL."""

    pid: int
    started: float
    url: str

    @property
    def is_alive(self) -> bool:
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        except psutil.NoSuchProcess:
            return False


def announce(data_dir: Path, url: str) -> None:
    """Write `server.json` for this process, atomically."""
    server = RunningServer(os.getpid(), psutil.Process().create_time(), url)
    temporary = data_dir / (ANNOUNCEMENT + ".new")
    temporary.write_text(json.dumps(asdict(server)))
    temporary.replace(data_dir / ANNOUNCEMENT)


def withdraw(data_dir: Path) -> None:
    """Remove this process's announcement, if it is there."""
    server = find_server(data_dir)
    if server is not None and server.pid == os.getpid():
        (data_dir / ANNOUNCEMENT).unlink(missing_ok=True)


def find_server(data_dir: Path) -> RunningServer | None:
    """The server that owns `data_dir`, or None where none is alive."""
    try:
        server = RunningServer(**load_json(data_dir / ANNOUNCEMENT))
    except (OSError, ValueError, TypeError):
        return None
    return server if server.is_alive else None


class Client:
    """One way to the API. `where` is a sentence for people: which server, or none."""

    def __init__(self, http: httpx.AsyncClient, where: str, runner: asyncio.Runner) -> None:
        self._http = http
        self._runner = runner
        self.where = where

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send one request; its JSON body. Raises `ApiRefused` for an error, `httpx.HTTPError` for no answer."""
        sent = {} if body is None and method != "GET" else body  # what changes something is sent as JSON, or refused
        return _result(self._runner.run(self._http.request(method, path, json=sent)))

    def watch(
        self, method: str, path: str, body: dict[str, Any], looked_at: str, seen: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Send one long request, and hand to `seen` what GET `looked_at` says meanwhile. Raises like `request`."""

        async def both() -> httpx.Response:
            answer = asyncio.ensure_future(self._http.request(method, path, json=body))
            while not answer.done():
                await asyncio.wait([answer], timeout=LOOK_EVERY_S)
                if not answer.done():
                    meanwhile = await self._http.get(looked_at)
                    if meanwhile.is_success:
                        seen(meanwhile.json())
            return answer.result()

        return _result(self._runner.run(both()))

    def text(self, path: str) -> str:
        """GET `path` as text. Raises like `request`."""
        answer = self._runner.run(self._http.get(path))
        if answer.is_error:
            raise ApiRefused(answer.status_code, _json_of(answer))
        return answer.text


@contextmanager
def connect(settings: Settings, *, with_trainer: bool = False) -> Iterator[Client]:
    """The API of the server that owns the data directory, or the same application in this process.

    `with_trainer` starts the supervisor thread in process, for commands that train. Raises `StoreError` where the
    store cannot be opened.
    """
    with asyncio.Runner() as runner:
        server = find_server(settings.data_dir)
        if server is not None:
            http = httpx.AsyncClient(base_url=server.url, timeout=PATIENCE)
            where = f"through the running server at {server.url}"
            try:
                yield Client(http, where, runner)
            finally:
                runner.run(http.aclose())
            return
        from chat_app.__main__ import compose

        with compose(settings, with_trainer=with_trainer) as app:
            http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=IN_PROCESS, timeout=PATIENCE)
            try:
                yield Client(http, "no server is running; working on the data directory itself", runner)
            finally:
                runner.run(http.aclose())


def _result(answer: httpx.Response) -> dict[str, Any]:
    if answer.is_error:
        raise ApiRefused(answer.status_code, _json_of(answer))
    result: dict[str, Any] = answer.json()
    return result


def _json_of(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = {}
    return body if isinstance(body, dict) else {}
