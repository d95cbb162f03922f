"""Swaps under concurrent streams, over HTTP, with the memory before and after → docs/benchmarks/swaps.md.

    make soak-swaps                                            200 swaps under 32 streams
    python scripts/soak_swaps.py --swaps 10 --seconds 5        a short one, which prints and writes nothing

Every version writes one letter of its own for ever (`tests/symbol_gguf.py`), so an answer that mixes two versions, or
carries another one's name, or has an event too many or too few, is seen. The same server, streams and client are
measured without swaps before and after. The client shares the machine with the server.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from server import Server, serving  # noqa: E402
from symbol_gguf import build_symbol_gguf, publish_symbol_version, symbol_of  # noqa: E402

from chat_app.serving.engine import Sampling  # noqa: E402
from chat_app.serving.scripted_engine import ScriptedEngine  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "swaps.md"
QUESTION = [{"role": "user", "content": "Which letter are you?"}]
TOKENS = 64
SCRIPTED_DELAY_S = 0.01
SETTLED_S = 150.0


@dataclass
class Heard:
    """What the streams of one phase brought."""

    streams: int = 0
    turned_away: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    gaps_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)

    def p99(self) -> float:
        return statistics.quantiles(self.gaps_ms, n=100)[-1]


@dataclass(frozen=True)
class Weight:
    """What the server and its children hold."""

    server_mib: float
    children_mib: float
    children: int
    files: int


async def expected(engine: str, version: str, seed: int) -> str:
    """The whole answer of a version."""
    if engine == "llama":
        return symbol_of(int(version[1:])) * TOKENS
    sampling = Sampling(seed=seed, max_tokens=TOKENS)
    return "".join([chunk.text async for chunk in ScriptedEngine(version).stream(QUESTION, sampling)])


async def listen(http: httpx.AsyncClient, engine: str, seed: int, heard: Heard) -> None:
    """One answer as it streams, and whether each event of it is as it should be."""
    body = {"messages": QUESTION, "stream": True, "max_tokens": TOKENS, "temperature": 0, "seed": seed}
    began = last = time.perf_counter()
    events: list[dict[str, Any]] = []
    done = 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code in (429, 503):
            heard.turned_away += 1
            await asyncio.sleep(0.2)
            return
        named = answer.headers.get("X-Zloop-Version", "")
        async for line in answer.aiter_lines():
            done += line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            events.append(event)
            if "choices" in event and event["choices"][0]["delta"].get("content"):
                now = time.perf_counter()
                (heard.gaps_ms if last > began else heard.first_ms).append(1000 * (now - last))
                last = now
    heard.streams += 1
    heard.versions.add(named)
    for fault in await faults(engine, seed, named, events, done):
        heard.wrong[fault] += 1


async def faults(engine: str, seed: int, named: str, events: list[dict[str, Any]], done: int) -> list[str]:
    """What is wrong with a stream: failed, mixed, mislabelled, doubled or missing."""
    if any("error" in event for event in events) or not named:
        return ["failed"]
    found = []
    choices = [event["choices"][0] for event in events]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    if text != (wanted := await expected(engine, named, seed)):
        letters = set(text)
        if engine == "llama" and len(letters) > 1:
            found.append("mixed")
        elif len(text) != len(wanted):
            found.append("duplicate or missing")
        else:
            found.append("mislabelled")
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    if len(ends) != 1 or done != 1 or len({event["id"] for event in events}) != 1:
        found.append("duplicate or missing")
    if {event["model"] for event in events} != {named}:
        found.append("mislabelled")
    return found


async def streams_while(url: str, engine: str, count: int, work: asyncio.Task[Any]) -> Heard:
    """`count` streams at once, each followed by the next, until `work` is done."""
    heard = Heard()

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        seed = number
        while not work.done():
            try:
                await listen(http, engine, seed, heard)
            except httpx.HTTPError:
                heard.wrong["failed"] += 1
            seed += count

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        await asyncio.gather(*(ask(http, number) for number in range(count)))
    await work
    return heard


async def swaps(url: str, first: int, count: int, took_s: list[float]) -> None:
    """Promote one version after the other."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        for number in range(first, first + count):
            began = time.perf_counter()
            answer = await http.post(f"/v1/versions/v{number}/promote", json={})
            answer.raise_for_status()
            took_s.append(time.perf_counter() - began)
            await asyncio.sleep(0.1)


def weigh(server: Server) -> Weight:
    """Memory and open files, once no old engine is draining any more (one stays warm, and a spare child waits)."""
    process = psutil.Process(server.process.pid)
    deadline = time.monotonic() + SETTLED_S
    while len(engines := process.children(recursive=True)) > 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    mib = 2**20
    return Weight(
        process.memory_info().rss / mib,
        sum(child.memory_info().rss for child in engines) / mib,
        len(engines),
        process.num_fds(),
    )


async def soak(server: Server, options: argparse.Namespace) -> tuple[Heard, Heard, Weight, Weight, list[float]]:
    """Streams without swaps, with, and without again. Returns (without, with, weight before, after, seconds a swap)."""

    async def quiet(seconds: float) -> Heard:
        return await streams_while(
            server.url, options.engine, options.streams, asyncio.create_task(asyncio.sleep(seconds))
        )

    took_s: list[float] = []
    warm_up = 2
    await swaps(server.url, 1, warm_up, [])
    await quiet(min(5.0, options.seconds))
    before = await asyncio.to_thread(weigh, server)
    without = await quiet(options.seconds)
    swapping = asyncio.create_task(swaps(server.url, 1 + warm_up, options.swaps, took_s))
    with_swaps = await streams_while(server.url, options.engine, options.streams, swapping)
    again = await quiet(options.seconds)
    after = await asyncio.to_thread(weigh, server)
    without.gaps_ms += again.gaps_ms
    without.first_ms += again.first_ms
    without.streams += again.streams
    without.turned_away += again.turned_away
    without.wrong += again.wrong
    return without, with_swaps, before, after, took_s


def report(options: argparse.Namespace, results: tuple[Heard, Heard, Weight, Weight, list[float]]) -> str:
    """The page."""
    without, during, before, after, took_s = results
    wrong = ["failed", "mixed", "mislabelled", "duplicate or missing"]
    rows = [
        (f"during {len(took_s)} swaps", during),
        ("without swaps, before and after", without),
    ]
    lines = [
        f"| {what} | {one.streams} | {' | '.join(str(one.wrong[kind]) for kind in wrong)} | {one.turned_away} "
        f"| {statistics.median(one.gaps_ms):.1f} | {one.p99():.1f} | {statistics.median(one.first_ms):.0f} |"
        for what, one in rows
    ]
    return f"""# Swaps under streams

`make soak-swaps`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), engine
`{options.engine}`, {options.streams} streams of {TOKENS} tokens at once over HTTP. Every version writes a letter of its
own; one that is swapped in is new each time. The client shares the cores with the server.

| | streams | {" | ".join(wrong)} | turned away | between tokens, median ms | p99 ms | first token, median ms |
|---|---|---|---|---|---|---|---|---|---|
{lines[0]}
{lines[1]}

**p99 between tokens during swaps: {during.p99() / without.p99():.2f} times that without** (target: at most 2).
A swap took {statistics.median(took_s):.2f} s (median), {max(took_s):.2f} s at most, from the request to the promotion;
{len(during.versions)} versions answered.

| memory | server MiB | engines MiB | engines | open files |
|---|---|---|---|---|
| before | {before.server_mib:.0f} | {before.children_mib:.0f} | {before.children} | {before.files} |
| after {len(took_s)} swaps | {after.server_mib:.0f} | {after.children_mib:.0f} | {after.children} | {after.files} |
"""


def main() -> None:
    """Measure; write the report after a full run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["llama", "scripted"], default="llama")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="without swaps, before and after")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        data_dir = Path(directory)
        base = build_symbol_gguf(data_dir / "symbols.gguf")
        for number in range(1, options.swaps + 3):
            publish_symbol_version(data_dir / "versions", number, "symbols", canaries=options.engine == "llama")
        limits = {"max_answers": options.streams, "max_answers_per_user": options.streams}
        settings = {"engine": options.engine, "model": base, "retrain_every": 0, "scripted_delay_s": SCRIPTED_DELAY_S}
        with serving(data_dir, **settings, **limits) as server:
            results = asyncio.run(soak(server, options))
    said = report(options, results)
    print(said)
    if options.engine == "llama" and options.swaps >= 200:
        REPORT.write_text(said, encoding="utf-8")
    if sum(results[1].wrong.values()):
        sys.exit("some streams were not whole")


if __name__ == "__main__":
    main()
