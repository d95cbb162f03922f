"""Eight kinds of failing swap on the native engine, with people chatting meanwhile: the old version answers them all.

Through the real operations, store, versions on disk and llama-server; `FAILING_SWAPS=10` repeats each kind ten times.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from gguf import GGUFWriter
from symbol_gguf import PROMPT, build_symbol_gguf, publish_symbol_version, symbol_of

from chat_app.__main__ import open_store
from chat_app.operations import NeedsMaintenance, Operations
from chat_app.serving import llama_engine
from chat_app.serving.engine import EngineError, EngineStartFailed, VersionNotServed
from chat_app.serving.slot import ModelSlot
from chat_app.settings import load_settings
from chat_app.trainer_room import TrainerRoom
from feedback_store.durable import read_json, sha256_of, write_json
from feedback_store.records import Message
from trainer import schedule
from trainer.errors import VersionDamaged

pytest.importorskip("xllamacpp", reason="the native engine is not installed")

TIMES = int(os.environ.get("FAILING_SWAPS", "2"))
STREAMS, TOKENS = 4, 48
ASKED: list[Message] = [{"role": "user", "content": "Say it."}]
HANG_LIMIT_S = 1.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_symbol_gguf(tmp_path_factory.mktemp("symbols") / "symbols.gguf")


@contextmanager
def house(tmp_path: Path, base: Path) -> Iterator[Operations]:
    """The operations with v1 and v2 published; no process stays behind."""
    for number in (1, 2):
        publish_symbol_version(tmp_path / "versions", number, "symbols")
    settings = load_settings({"ZLOOP_DATA_DIR": str(tmp_path), "ZLOOP_MODEL": str(base)})
    before = psutil.Process().children()
    with open_store(settings) as store:
        build = partial(llama_engine.build_llama_engine, log_dir=tmp_path / "logs")
        yield Operations(settings, store, TrainerRoom(settings, store), ModelSlot(build), schedule.is_due)
    assert [child for child in psutil.Process().children() if child not in before] == []


async def answers_while(operations: Operations, work: Callable[[], object], version: str | None = None) -> list[str]:
    """The versions that answered while `work` went on; each answer is whole and its version's own."""
    over, written = asyncio.Event(), []

    async def ask() -> None:
        while not over.is_set():
            sampling = operations.sampling(max_tokens=TOKENS, temperature=0)
            answer = await operations.answers.answer(ASKED, sampling, version=version)
            assert (answer.text, answer.finish_reason) == (symbol_of(int(answer.version[1:])) * TOKENS, "length")
            written.append(answer.version)

    async def all_of_it() -> None:
        try:
            await work()  # type: ignore[misc]
        finally:
            over.set()

    await asyncio.gather(all_of_it(), *(ask() for _ in range(STREAMS)))
    return written


def rehash(directory: Path) -> None:
    """Make the manifest agree with files that were changed: what is wrong then is not found by a hash."""
    manifest = read_json(directory / "manifest.json")
    assert manifest is not None
    manifest["files"] = {name: sha256_of(directory / name) for name in manifest["files"]}
    write_json(directory / "manifest.json", manifest)


def missing_file(directory: Path, _: pytest.MonkeyPatch) -> None:
    (directory / "adapter.gguf").unlink()


def bad_hash(directory: Path, _: pytest.MonkeyPatch) -> None:
    path = directory / "adapter.gguf"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def not_a_number(directory: Path, _: pytest.MonkeyPatch) -> None:
    writer = GGUFWriter(directory / "adapter.gguf", "llama")
    writer.add_tensor("blk.0.ffn_down.weight.lora_a", np.full((1, 32), np.nan, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rehash(directory)


def wrong_shape(directory: Path, _: pytest.MonkeyPatch) -> None:
    publish_symbol_version(directory.parent.parent / "other", 2, "symbols", hidden=32)
    (directory.parent.parent / "other" / "v2" / "adapter.gguf").replace(directory / "adapter.gguf")
    rehash(directory)


def other_weights(directory: Path, _: pytest.MonkeyPatch) -> None:
    publish_symbol_version(directory.parent.parent / "other", 2, "symbols", canary=3)
    (directory.parent.parent / "other" / "v2" / "evaluation.json").replace(directory / "evaluation.json")
    rehash(directory)


def other_template(directory: Path, _: pytest.MonkeyPatch) -> None:
    drifted = PROMPT.replace("helpful AI assistant", "terse AI assistant")
    publish_symbol_version(directory.parent.parent / "other", 2, "symbols", prompt=drifted)
    (directory.parent.parent / "other" / "v2" / "evaluation.json").replace(directory / "evaluation.json")
    rehash(directory)


def signalled(sent: signal.Signals) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """The server's process gets a signal as soon as it runs."""

    def sabotage(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spawn = llama_engine._spawn

        def spawn_and_signal(log_path: Path) -> subprocess.Popen[bytes]:
            process = spawn(log_path)
            process.send_signal(sent)
            return process

        monkeypatch.setattr(llama_engine, "_spawn", spawn_and_signal)
        monkeypatch.setattr(llama_engine, "STOP_LIMIT_S", 0.1)

    return sabotage


killed, hung = signalled(signal.SIGKILL), signalled(signal.SIGSTOP)


def no_memory(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_engine, "available_bytes", lambda: 1_000_000)


@pytest.mark.parametrize(
    ("sabotage", "error", "sentence"),
    [
        pytest.param(missing_file, VersionDamaged, r"adapter\.gguf is missing", id="missing file"),
        pytest.param(bad_hash, VersionDamaged, r"adapter\.gguf is not the file", id="bad hash"),
        pytest.param(not_a_number, VersionDamaged, "not finite", id="NaN weights"),
        pytest.param(wrong_shape, EngineStartFailed, "exit code 1", id="wrong shape"),
        pytest.param(other_weights, EngineStartFailed, "not the weights that were judged", id="other weights"),
        pytest.param(other_template, EngineStartFailed, "the chat template is another one", id="template drift"),
        pytest.param(killed, EngineStartFailed, r"exit code -9|Broken pipe", id="killed while loading"),
        pytest.param(hung, EngineStartFailed, "not ready after 1 s", id="hang"),
        pytest.param(no_memory, NeedsMaintenance, "no room for two models", id="out of memory"),
    ],
)
def test_the_old_version_answers_everybody(
    sabotage: Callable[[Path, pytest.MonkeyPatch], None],
    error: type[Exception],
    sentence: str,
    tmp_path: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run(operations: Operations) -> None:
        await operations.start_serving()
        await operations.promote("v1")
        await operations.answers.slot.release("v0")  # else it would make room, or be gone back to
        if sabotage is hung:
            operations.answers.slot._starter._limit_s = HANG_LIMIT_S
        sabotage(tmp_path / "versions" / "v2", monkeypatch)

        async def promotions() -> None:
            for _ in range(TIMES):
                with pytest.raises(error, match=sentence):
                    await operations.promote("v2")

        try:
            written = await answers_while(operations, promotions)
            assert len(written) >= STREAMS
            assert set(written) == {"v1"}
            assert (operations.champion(), operations.status().problem) == ("v1", None)
        finally:
            await operations.close()

    with house(tmp_path, base) as operations:
        asyncio.run(run(operations))


def test_a_maintenance_swap_back_to_the_old_version_where_the_new_one_fails(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one server only: the first try fails and v1 comes back, the second serves v2; nobody is turned away."""

    async def run(operations: Operations) -> None:
        await operations.start_serving()
        await operations.promote("v1")
        await operations.answers.slot.release("v0")
        servers: list[psutil.Process] = []
        room = llama_engine.available_bytes

        def room_for_one() -> int:
            servers[:] = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
            return 0 if servers else room()

        monkeypatch.setattr(llama_engine, "available_bytes", room_for_one)
        evaluation = tmp_path / "versions" / "v2" / "evaluation.json"
        good = evaluation.read_bytes()

        async def promotions() -> None:
            with pytest.raises(NeedsMaintenance, match=r'\{"maintenance": true\}'):
                await operations.promote("v2")
            other_weights(evaluation.parent, monkeypatch)
            with pytest.raises(EngineStartFailed, match="not the weights"):
                await operations.promote("v2", maintenance=True)
            assert operations.champion() == "v1"
            evaluation.write_bytes(good)
            rehash(evaluation.parent)
            assert await operations.promote("v2", maintenance=True) == ("v2", "v1")

        try:
            written = await answers_while(operations, promotions)
            assert set(written) <= {"v1", "v2"}
            assert (await operations.answers.answer(ASKED, operations.sampling(max_tokens=4))).version == "v2"
        finally:
            await operations.close()

    with house(tmp_path, base) as operations:
        asyncio.run(run(operations))


def test_versions_beside_each_other_each_write_their_own(tmp_path: Path, base: Path) -> None:
    async def run(operations: Operations) -> None:
        await operations.start_serving()
        try:
            assert await operations.serve_beside("v1") == ("v0", "v1")
            assert await operations.serve_beside("v2") == ("v0", "v1", "v2")
            versions = [operations.require_served(model) for model in ("champion", "v1", "v2")]
            sampling = operations.sampling(max_tokens=TOKENS, temperature=0)
            answers = await asyncio.gather(
                *(operations.answers.answer(ASKED, sampling, version=one) for one in versions)
            )
            assert [(answer.version, set(answer.text)) for answer in answers] == [
                (f"v{number}", {symbol_of(number)}) for number in range(3)
            ]
            async with aclosing(operations.answers.stream(ASKED, sampling, version="v2")) as growing:
                await anext(growing)
                assert await operations.release("v2") == ("v0", "v1")
                assert [one async for one in growing][-1].text == symbol_of(2) * TOKENS
            with pytest.raises(VersionNotServed):
                await operations.answers.answer(ASKED, sampling, version="v2")
            with pytest.raises(EngineError, match="champion"):
                await operations.release("v0")
        finally:
            await operations.close()

    with house(tmp_path, base) as operations:
        asyncio.run(run(operations))
