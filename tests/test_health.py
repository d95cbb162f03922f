"""Readiness, liveness and refusals over a real socket: what a probe and a client read when something is missing."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from house import Watched, api_on_a_port, until, watched

from chat_app import health
from chat_app.serving.engine import ServedVersion

LONG = {"messages": [{"role": "user", "content": "A long story"}]}
CHAT = "/v1/chat/completions"


class Counts(Watched):
    """Knows how often it was checked; can be made to freeze."""

    checks = 0
    frozen = False

    async def check(self) -> None:
        self.checks += 1
        if self.frozen:
            await asyncio.Event().wait()
        await super().check()


async def counts(served: ServedVersion) -> Counts:
    return Counts(served.version)


def client(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20)


def test_while_it_starts_it_lives_and_is_not_ready(tmp_path: Path) -> None:
    async def work() -> None:
        async with api_on_a_port(counts, tmp_path, started=False) as (operations, port), client(port) as http:
            assert (await http.get("/livez")).json() == {"status": "ok"}
            red = await http.get("/readyz")
            assert red.status_code == 503
            assert red.headers["retry-after"] == "5"
            assert "starting" in red.json()["problem"]
            refused = await http.post(CHAT, json=LONG)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable")
            await operations.start_serving()
            assert (await http.get("/readyz")).json()["status"] == "ok"

    asyncio.run(work())


def test_a_generation_is_tried_only_where_nobody_was_answered_lately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with api_on_a_port(counts, tmp_path) as (operations, port), client(port) as http:
            engine: Any = operations.answers.slot._champion.engine  # type: ignore[union-attr]
            assert engine.checks == 1  # the slot's own
            assert (await http.get("/readyz")).is_success
            assert engine.checks == 1
            operations.answers.wrote_at = None
            several = await asyncio.gather(*(http.get("/readyz") for _ in range(8)))
            assert all(answer.is_success for answer in several)
            assert engine.checks == 2  # one for all of them
            operations.answers.wrote_at = None
            monkeypatch.setattr(health, "FRESH_S", 0)
            await http.get("/readyz")
            assert engine.checks == 3

    asyncio.run(work())


def test_an_engine_that_writes_nothing_is_not_ready_and_one_that_died_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CHECK_LIMIT_S", 0.2)

    async def work() -> None:
        async with api_on_a_port(counts, tmp_path) as (operations, port), client(port) as http:
            engine: Any = operations.answers.slot._champion.engine  # type: ignore[union-attr]
            operations.answers.wrote_at = None
            engine.frozen = True
            red = await http.get("/readyz")
            assert red.status_code == 503
            assert "wrote nothing within 0.2 s" in red.json()["problem"]
            await engine.close()
            assert (await http.get("/readyz")).is_success
            assert operations.answers.slot._champion.engine is not engine  # type: ignore[union-attr]

    asyncio.run(work())


def test_a_full_house_is_503_and_a_line_full_of_one_s_own_429(tmp_path: Path) -> None:
    async def work() -> None:
        build = partial(watched, delay_s=0.1)
        async with (
            api_on_a_port(build, tmp_path, max_answers=2, max_waiting=1) as (operations, port),
            client(port) as http,
        ):
            admission = operations.answers.admission
            seated = [asyncio.create_task(http.post(CHAT, json={**LONG, "user": user})) for user in "ab"]
            await until("all seats are taken", lambda: admission.decoding == 2)
            waiting = asyncio.create_task(http.post(CHAT, json={**LONG, "user": "c", "stream": True}))
            await until("one waits", lambda: admission.waiting == 1)
            full = await http.post(CHAT, json={**LONG, "user": "d"})
            assert (full.status_code, full.json()["error"]["type"]) == (503, "unavailable")
            own = await http.post("/v1/pairs", json={**LONG, "user": "c"})
            assert (own.status_code, own.json()["error"]["type"]) == (429, "too_many")
            assert "2 of them yours" in own.json()["error"]["message"]
            for refused in (full, own):
                assert 1 <= int(refused.headers["retry-after"]) <= 120
            answers = await asyncio.gather(*seated, waiting)
            assert [answer.status_code for answer in answers] == [200, 200, 200]

    asyncio.run(work())


def test_a_heavy_user_does_not_keep_another_one_waiting(tmp_path: Path) -> None:
    async def work() -> None:
        limits = {"max_answers": 4, "max_answers_per_user": 2}
        async with (
            api_on_a_port(partial(watched, delay_s=0.02), tmp_path, **limits) as (operations, port),
            client(port) as http,
        ):
            done: list[str] = []

            async def ask(user: str) -> None:
                assert (await http.post(CHAT, json={**LONG, "user": user, "max_tokens": 16})).is_success
                done.append(user)

            heavy = [asyncio.create_task(ask("heavy")) for _ in range(20)]
            await until("the heavy user has filled what is theirs", lambda: operations.answers.admission.waiting == 18)
            for _ in range(3):
                await ask("light")
            assert done.count("heavy") <= 10
            await asyncio.gather(*heavy)

    asyncio.run(work())
