"""Test support: promote a faulty version under streams, wait until it was taken back, again and again.

The whole product but the model: the HTTP API on a real socket, the store, the slot; the scripted engine goes wrong on
demand. Every answer a client reads is compared with what its version says. `tests/test_baking_watch.py` runs each kind
once, `scripts/soak_baking.py` fifty cycles.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import uvicorn
from symbol_gguf import publish_symbol_version

from chat_app.__main__ import TRAINER_STATUSES, open_store
from chat_app.api import create_api
from chat_app.metrics import Metrics
from chat_app.operations import Operations
from chat_app.serving.engine import Sampling
from chat_app.serving.scripted_engine import Fault, ScriptedEngine, build_scripted_engine
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from feedback_store.records import Message
from trainer import schedule

KINDS = (
    Fault.BREAKS_OFF,
    Fault.EMPTY,
    Fault.SLOW,
    Fault.REPEATS,
    Fault.DOUBLES,
    Fault.DIES,
    Fault.FAILS_AT_ONCE,
)
QUESTION: list[Message] = [{"role": "user", "content": "How do I begin with a thing that I never did before?"}]
BEFORE = 200  # answers of the good version before the first promotion
BETWEEN = 40  # and between two
WAIT_S = 60.0


@dataclass
class Cycle:
    """One promotion of a faulty version and how it ended.

    `begun`: answers asked of it until then; `broken`: those it broke after their first word.
    """

    version: str
    fault: Fault
    back: bool = False
    requests: int = 0
    begun: int = 0
    seconds: float = 0.0
    rescued: int = 0
    broken: int = 0
    reason: str = ""


@dataclass
class Heard:
    """What the clients read: whole answers by version, answers that a version broke itself, and whatever else."""

    whole: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass
class House:
    """The product as it runs here."""

    operations: Operations
    slot: ModelSlot
    faults: Mapping[str, Fault]
    url: str


@asynccontextmanager
async def serving_faulty(
    data_dir: Path, faults: Mapping[str, Fault], delay_s: float, seats: int
) -> AsyncIterator[House]:
    """The API on loopback, `v0` being served; `faults` says what is wrong with which version."""
    for version in faults:
        publish_symbol_version(data_dir / "versions", int(version[1:]), "smollm2-135m-instruct", canaries=False)
    given = {"DATA_DIR": data_dir, "ENGINE": "scripted", "MAX_ANSWERS": seats, "MAX_ANSWERS_PER_USER": seats}
    settings = load_settings({f"ZLOOP_{name}": str(value) for name, value in given.items()})
    metrics = Metrics()
    slot = ModelSlot(metrics.counting(partial(build_scripted_engine, delay_s=delay_s, faults=faults)))
    with open_store(settings) as store, closing(socket.socket()) as listener:
        operations = Operations(settings, store, TrainerRoom(settings, store), slot, schedule.is_due, metrics=metrics)
        listener.bind(("127.0.0.1", 0))
        app = create_api(operations, TRAINER_STATUSES)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        await operations.start_serving()
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield House(operations, slot, faults, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            await running
            await operations.close()


async def cycles(
    data_dir: Path, kinds: Sequence[Fault], *, streams: int, delay_s: float = 0.002
) -> tuple[list[Cycle], Heard]:
    """Promote one faulty version after the other under `streams` clients."""
    faults = {f"v{number}": fault for number, fault in enumerate(kinds, 1)}
    heard = Heard()
    done: list[Cycle] = []
    async with serving_faulty(data_dir, faults, delay_s, streams) as house:
        over = asyncio.Event()
        async with httpx.AsyncClient(base_url=house.url, timeout=60, trust_env=False) as http:
            clients = [asyncio.create_task(_client(http, house, heard, over)) for _ in range(streams)]
            try:
                await _answers(heard, "v0", BEFORE)
                for version, fault in faults.items():
                    done.append(await _cycle(http, house, version, fault))
                    await _answers(heard, "v0", heard.whole["v0"] + BETWEEN)
            finally:
                over.set()
                await asyncio.gather(*clients)
    for cycle in done:
        cycle.broken = heard.broken[cycle.version]
    return done, heard


async def _cycle(http: httpx.AsyncClient, house: House, version: str, fault: Fault) -> Cycle:
    cycle = Cycle(version, fault)
    began = time.monotonic()
    (await http.post(f"/v1/versions/{version}/promote", json={"bake": True})).raise_for_status()
    with suppress(TimeoutError):
        async with asyncio.timeout(WAIT_S):
            while house.operations.baking.as_body()["state"] != "taken back":  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    cycle.seconds = time.monotonic() - began
    told = (await http.get("/v1/baking")).raise_for_status().json()
    cycle.back = house.slot.version == "v0" and house.operations.champion() == "v0"
    cycle.requests, cycle.begun = told["requests"], told["begun"]
    cycle.rescued, cycle.reason = told["rescued"], told["sentence"]
    return cycle


async def _answers(heard: Heard, version: str, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while heard.whole[version] < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def _client(http: httpx.AsyncClient, house: House, heard: Heard, over: asyncio.Event) -> None:
    while not over.is_set():
        try:
            await _listen(http, house, heard)
        except httpx.HTTPError as error:
            heard.wrong.append(f"the connection broke: {error!r}")


async def _listen(http: httpx.AsyncClient, house: House, heard: Heard) -> None:
    """One answer as it streams, and whether it is what its version says; its seed stands in it."""
    body = {"messages": QUESTION, "stream": True}
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.is_error:
            heard.wrong.append(f"{answer.status_code} {(await answer.aread()).decode()[:200]}")
            return
        version = answer.headers["X-Zloop-Version"]
        lines = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    text = "".join(one["choices"][0]["delta"].get("content") or "" for one in events if "choices" in one)
    fault = house.faults.get(version)
    if any("error" in event for event in events):
        if fault in (Fault.BREAKS_OFF, Fault.DIES) and text.strip():
            heard.broken[version] += 1
        else:
            heard.wrong.append(f"{version} ({fault}) failed: {events[-1]}")
        return
    said = ScriptedEngine(version, fault=None if fault is Fault.SLOW else fault)
    take = re.search(r"take (\d+)", text)
    sampling = Sampling(seed=int(take[1]) if take else None, max_tokens=1024)
    with suppress(Exception):
        wanted = "".join([chunk.text async for chunk in said.stream(QUESTION, sampling)])
        if text == wanted and lines[-1] == "[DONE]" and {event["model"] for event in events} == {version}:
            heard.whole[version] += 1
            return
    heard.wrong.append(f"{version} ({fault}) said {text[:80]!r}")
