"""What a flood costs everybody else → docs/benchmarks/floods.md.

    make soak-floods
    python scripts/soak_floods.py --short        a smaller one, which prints and writes nothing

Two measurements on a real server with the scripted engine, in one run, so that each has its own quiet figure beside
it: picks while 45 imports are sent at once; and a request on a new connection while 1,000 connections are idle and 200
never finish the head of their request. (Bombs: `tests/security/test_bombs.py`.)
"""

import argparse
import contextlib
import json
import platform
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from server import Server, serving  # noqa: E402

REPORT = ROOT / "docs" / "benchmarks" / "floods.md"
PICK_LIMIT_MS, ANSWER_LIMIT_S, LOG_LIMIT = 100.0, 1.0, 10


def main() -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer rounds; print, write nothing")
    short = parser.parse_args().short
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8_192)), hard))
    lines = [*imports_beside_picks(rounds=1 if short else 3, picks=60 if short else 300),
             *connections(answers=20 if short else 200)]  # fmt: skip
    report = "\n".join([*heading(), *lines, ""])
    print(report)
    if not short:
        REPORT.write_text(report, encoding="utf-8")


def heading() -> list[str]:
    """Date and machine."""
    date = datetime.now(UTC).date().isoformat()
    where = f"`make soak-floods`, {date}, 2 cores ({platform.machine()}), loopback, the scripted engine"
    return ["# Floods", "", f"{where}; clients and server share the cores.", ""]


# --- imports beside picks --------------------------------------------------------------------------------------------


def imports_beside_picks(*, rounds: int, picks: int) -> list[str]:
    """Picks quiet, then while 45 imports are sent again and again."""
    quiet: list[float] = []
    flooded: list[float] = []
    statuses: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "data", engine="scripted") as server:
        upload = import_file(rows=20_000)
        for _ in range(rounds):
            pairs = [server.pair("What now?")["pair_id"] for _ in range(2 * picks)]
            quiet += timed_picks(server, pairs[:picks])
            with flooding(server, upload, 45, statuses):
                flooded += timed_picks(server, pairs[picks:])
    shown = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
    ratio = p99(flooded) / p99(quiet)
    return [
        "## Picks beside 45 imports at once",
        "",
        f"{rounds} rounds of {picks} picks, one after the other, each on a kept connection; 20,000 rows an import, 45 "
        f"clients that send it again as soon as they are answered ({shown}).",
        "",
        *table({"quiet": quiet, "45 imports": flooded}),
        "",
        f"p99 {ratio:.1f} times the quiet one; target {PICK_LIMIT_MS:.0f} ms: "
        f"**{'met' if 1000 * p99(flooded) <= PICK_LIMIT_MS else 'missed'}**.",
        "",
    ]  # fmt: skip


def import_file(rows: int) -> bytes:
    """TRL lines, each different."""
    return b"".join(
        json.dumps({"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, {n}."}).encode() + b"\n"
        for n in range(rows)
    )


def timed_picks(server: Server, pairs: Sequence[str]) -> list[float]:
    """Seconds of each pick."""
    took = []
    for pair_id in pairs:
        began = time.perf_counter()
        server.post("/v1/picks", {"pair_id": pair_id, "pick": "first"})
        took.append(time.perf_counter() - began)
    return took


@contextlib.contextmanager
def flooding(server: Server, upload: bytes, clients: int, statuses: dict[int, int]) -> Iterator[None]:
    """45 clients that import, for as long as the block lasts."""
    stop = threading.Event()

    def client() -> None:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while not stop.is_set():
                answer = http.post("/v1/imports", files={"file": ("flood.jsonl", upload)}, data={"format": "trl"})
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                stop.wait(0.5 if answer.status_code == 429 else 0)

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            time.sleep(1)
            yield
        finally:
            stop.set()
            for one in running:
                one.result()


# --- connections -----------------------------------------------------------------------------------------------------


def connections(*, answers: int) -> list[str]:
    """A request on a connection of its own, quiet and beside idle and slow connections."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "data", engine="scripted") as server:
        quiet = timed_answers(server, answers)
        before = len(server.log.read_text().splitlines())
        with held(server, 1_000, b""), held(server, 200, b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
            flooded = timed_answers(server, answers)
        grown = len(server.log.read_text().splitlines()) - before
    met = max(flooded) <= ANSWER_LIMIT_S and grown <= LOG_LIMIT
    return [
        "## 1,000 idle and 200 slow connections",
        "",
        f"{answers} requests for `/livez`, each on a connection of its own. The log grew by {grown} lines.",
        "",
        *table({"quiet": quiet, "held": flooded}),
        "",
        f"Target: at most {ANSWER_LIMIT_S:.0f} s, at most {LOG_LIMIT} lines: **{'met' if met else 'missed'}**.",
        "",
    ]  # fmt: skip


def timed_answers(server: Server, number: int) -> list[float]:
    """Seconds of each request."""
    took = []
    for _ in range(number):
        began = time.perf_counter()
        httpx.get(f"{server.url}/livez", timeout=60).raise_for_status()
        took.append(time.perf_counter() - began)
    return took


@contextlib.contextmanager
def held(server: Server, number: int, said: bytes) -> Iterator[None]:
    """Connections that say this much and no more; one that the server closes is opened again."""
    host, port = server.url.removeprefix("http://").split(":")
    stop = threading.Event()

    def open_one() -> socket.socket:
        one = socket.create_connection((host, int(port)), timeout=10)
        one.sendall(said)
        one.setblocking(False)
        return one

    open_ones = [open_one() for _ in range(number)]

    def reopen() -> None:
        while not stop.wait(0.5):
            for index, one in enumerate(open_ones):
                with contextlib.suppress(BlockingIOError, OSError):
                    if one.recv(1) == b"":
                        one.close()
                        open_ones[index] = open_one()

    reopening = threading.Thread(target=reopen)
    reopening.start()
    try:
        yield
    finally:
        stop.set()
        reopening.join()
        for one in open_ones:
            one.close()


def table(measured: dict[str, list[float]]) -> list[str]:
    """Rows of milliseconds, from seconds."""
    rows = [
        f"| {name} | "
        + " | ".join(f"{1000 * one:.1f} ms" for one in (statistics.median(all_), p99(all_), max(all_)))
        + " |"
        for name, all_ in measured.items()
    ]
    return ["| | p50 | p99 | worst |", "|---|---|---|---|", *rows]


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[max(0, round(0.99 * len(values)) - 1)]


if __name__ == "__main__":
    main()
