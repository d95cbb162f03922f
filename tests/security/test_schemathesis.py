"""schemathesis over /openapi.json, on the API on a real port: no server error, no status or shape that is not said.

A fixed seed and few examples here; `make fuzz` (FUZZ=all) takes many, from another seed each time, and walks from one
route to the next as well.
"""

import asyncio
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from asgi_house import application
from house import until
from server import free_port

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
LONG = os.environ.get("FUZZ") == "all"
EXAMPLES, MOST_S = (int(os.environ.get("FUZZ_EXAMPLES", "300")), 7_200) if LONG else (2, 600)


@contextmanager
def api_in_a_thread(data_dir: Path) -> Iterator[str]:
    """The URL of the API, served by a loop of its own."""
    port, started = free_port(), threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        with application(data_dir) as (operations, app):
            await operations.start_serving()
            # A connection that was idle for a moment must not be closed while the next request is on its way.
            config = uvicorn.Config(
                app, port=port, log_level="error", lifespan="off", ws="none", timeout_keep_alive=600
            )
            server = uvicorn.Server(config)
            servers.append(server)
            serving = asyncio.create_task(server.serve())
            await until("the server listens", lambda: server.started, within_s=60)
            started.set()
            await serving
            await operations.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(60)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        servers[0].should_exit = True
        thread.join()


def test_every_operation_keeps_its_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    seed = random.SystemRandom().randrange(2**31) if LONG else 12
    with api_in_a_thread(tmp_path / "data") as url:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"),
                *("--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing" + (",stateful" if LONG else "")),
                *("--max-examples", str(EXAMPLES), "--seed", str(seed), "--no-shrink", "--continue-on-failure"),
                *("--generation-database", "none", "--warnings", "off", "--no-color"),
                *("--request-retries", "2", "--suppress-health-check", "all"),
            ],
            check=False,
            cwd=work,
            capture_output=True,
            text=True,
            timeout=MOST_S,
        )
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
