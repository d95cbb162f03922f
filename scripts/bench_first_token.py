"""First-token time of the chat, idle and while a run trains, in one run on one server → docs/benchmarks/first-token.md.

    make bench-first-token

The server is a fresh one in a temporary directory, with the embedded model; the run is a practice run, cancelled at the
end. Asked over HTTP, one question at a time, each with words of its own, so that no prompt cache helps.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from server import Server, serving  # noqa: E402

ASKED = 30
REPORT = ROOT / "docs" / "benchmarks" / "first-token.md"


def first_token_ms(server: Server, number: int) -> float:
    """Milliseconds from sending the request to the first text."""
    body = {
        "messages": [{"role": "user", "content": f"Tell me in a sentence what is special about the number {number}."}],
        "stream": True,
        "max_tokens": 16,
    }
    began = time.perf_counter()
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return 1000 * (time.perf_counter() - began)
    raise RuntimeError("an answer without text")


def measure(server: Server, start: int) -> list[float]:
    """First-token times of `ASKED` questions nobody asked before, in milliseconds."""
    return [first_token_ms(server, start + number) for number in range(ASKED)]


def wait_for_step(server: Server, run_id: str, step: int) -> None:
    """Training is in full swing once a step is done."""
    while (run := server.get(f"/v1/runs/{run_id}"))["step"] < step:
        if run["state"] not in ("queued", "preparing", "training"):
            raise RuntimeError(f"{run_id} is {run['state']}: {run['error']}")
        time.sleep(0.5)


def row(what: str, times: list[float]) -> str:
    """One line of the table."""
    p95 = statistics.quantiles(times, n=20)[-1]
    return f"| {what} | {len(times)} | {statistics.median(times):.0f} | {p95:.0f} | {max(times):.0f} |"


def main() -> None:
    """Measure and write the report."""
    with tempfile.TemporaryDirectory() as directory, serving(Path(directory), retrain_every=0) as server:
        measure(server, 0)
        idle_before = measure(server, 1_000)
        run_id = server.post("/v1/runs", {"practice": "shorter"})["run_id"]
        wait_for_step(server, run_id, 1)
        training = measure(server, 2_000)
        still = server.get(f"/v1/runs/{run_id}")["state"]
        server.post(f"/v1/runs/{run_id}/cancel")
        server.run_to_its_end(run_id)
        idle_after = measure(server, 3_000)
    if still != "training":
        sys.exit(f"the run was {still} before the last question: nothing was measured")
    idle = idle_before + idle_after
    ratio = statistics.median(training) / statistics.median(idle)
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(
        f"""# First token, idle and while a run trains

`make bench-first-token`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores ({platform.machine()}), embedded model,
one question at a time over HTTP, 16 tokens each. Idle is measured before and after the run; training is a practice run
in full swing.

| | n | median ms | p95 ms | worst ms |
|---|---|---|---|---|
{row("idle", idle)}
{row("training", training)}

**Ratio of the medians: {ratio:.2f}** (target: at most 3).
"""
    )
    print(REPORT.read_text())


if __name__ == "__main__":
    main()
