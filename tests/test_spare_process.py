"""The spare child: taken by the next engine, replaced where it died, gone with the last engine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import tiny_model

from chat_app.serving.engine import EngineStartFailed, ServedVersion
from chat_app.serving.spare_process import LlamaEngines

pytest.importorskip("xllamacpp", reason="the embedded engine is not installed")


async def spare_of(engines: LlamaEngines) -> int:
    deadline = time.monotonic() + 10
    while engines.spare_pid is None:
        assert time.monotonic() < deadline, "no spare child was started"
        await asyncio.sleep(0.01)
    return engines.spare_pid


def test_the_next_engine_takes_the_spare_and_writes_into_its_own_log(tmp_path: Path) -> None:
    gguf = tiny_model.shared_tiny().gguf
    before = psutil.Process().children()

    async def run() -> None:
        engines = LlamaEngines(tmp_path, spare_after_s=0.0)
        first = await engines.build(ServedVersion("v0", gguf))
        spare = await spare_of(engines)
        second = await engines.build(ServedVersion("v1", gguf))
        assert second.pid == spare != first.pid
        await second.check()
        (tmp_path / "bad.gguf").write_bytes(b"GGUF but no model")
        await spare_of(engines)
        with pytest.raises(EngineStartFailed, match="failed to load model"):  # said by the spare, in the right log
            await engines.build(ServedVersion("v2", tmp_path / "bad.gguf"))
        third = await spare_of(engines)
        await first.close()
        assert psutil.pid_exists(third)
        await second.close()
        await second.close()
        assert engines.spare_pid is None

    asyncio.run(run())
    assert [child for child in psutil.Process().children() if child not in before] == []


def test_a_spare_that_died_is_no_loss(tmp_path: Path) -> None:
    gguf = tiny_model.shared_tiny().gguf
    before = psutil.Process().children()

    async def run() -> None:
        engines = LlamaEngines(tmp_path, spare_after_s=0.0)
        first = await engines.build(ServedVersion("v0", gguf))
        os.kill(await spare_of(engines), signal.SIGKILL)
        await asyncio.sleep(0.05)
        second = await engines.build(ServedVersion("v1", gguf))
        await second.check()
        await second.close()
        await first.close()

    asyncio.run(run())
    assert [child for child in psutil.Process().children() if child not in before] == []
