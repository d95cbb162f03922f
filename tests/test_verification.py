"""What an engine must show before it serves: in time, as recorded; whatever comes too late is closed."""

from __future__ import annotations

import asyncio
import time

import pytest

from chat_app.serving import verification
from chat_app.serving.engine import Canary, EngineStartFailed, ServedVersion
from chat_app.serving.scripted_engine import Fault, ScriptedEngine, build_scripted_engine
from chat_app.serving.verification import Starter
from feedback_store.records import Message

HELLO: tuple[Message, ...] = ({"role": "user", "content": "Hello there"},)
AS_RECORDED = Canary(HELLO, "This is v1, take 0. You asked: Hello")


class ShowsItsPrompt(ScriptedEngine):
    """A scripted engine with a chat template."""

    async def prompt_text(self, messages: tuple[Message, ...]) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def start(*canaries: Canary, engine: ScriptedEngine | None = None) -> ScriptedEngine:
    made = engine or ScriptedEngine("v1")

    async def build(_: ServedVersion) -> ScriptedEngine:
        return made

    asyncio.run(Starter(build, 5).start(ServedVersion("v1", canaries=canaries)))
    return made


def test_a_version_that_begins_as_recorded_may_serve() -> None:
    assert start().is_alive
    assert start(AS_RECORDED, Canary(HELLO, "\n This is v1")).is_alive
    assert start(AS_RECORDED, engine=ShowsItsPrompt("v1")).is_alive


def test_other_weights_are_refused_with_what_was_said_and_closed() -> None:
    engine = ScriptedEngine("v1")
    with pytest.raises(EngineStartFailed, match=r"'Hello there' with 'This is v1, take 0.*began 'This is v0, take 0"):
        start(AS_RECORDED, Canary(HELLO, "This is v0, take 0"), engine=engine)
    assert not engine.is_alive


def test_an_answer_that_ends_too_early_is_refused() -> None:
    whole = start()
    with pytest.raises(EngineStartFailed, match="not the weights that were judged"):
        start(Canary(HELLO, "x" * 500), engine=whole.__class__("v1"))


def test_another_chat_template_is_refused_where_the_engine_shows_its_prompt() -> None:
    drifted = Canary(HELLO, AS_RECORDED.begins, prompt="<system>Be kind.<user>Hello there")
    assert start(drifted).is_alive  # an engine that cannot say
    with pytest.raises(EngineStartFailed, match="the chat template is another one"):
        start(drifted, engine=ShowsItsPrompt("v1"))
    assert start(Canary(HELLO, AS_RECORDED.begins, "<user>Hello there"), engine=ShowsItsPrompt("v1")).is_alive


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_start_that_hangs_is_given_up(stubborn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "CANCEL_GRACE_S", 0.05)

    async def run() -> None:
        release = asyncio.Event()

        async def build(served: ServedVersion) -> ScriptedEngine:
            if not stubborn:
                return await build_scripted_engine(served, faults={"v1": Fault.HANGS_IN_START})
            while not release.is_set():  # a builder that does not obey a cancellation, and comes back in the end
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    ignored.append(1)
            late.append(ScriptedEngine("v1"))
            return late[0]

        ignored: list[int] = []
        late: list[ScriptedEngine] = []
        starter = Starter(build, 0.05)
        began = time.monotonic()
        with pytest.raises(EngineStartFailed, match=r"v1 did not start: it was not ready after 0\.05 s"):
            await starter.start(ServedVersion("v1"))
        assert time.monotonic() - began < 3
        release.set()
        await starter.close()
        if stubborn:
            assert ignored
            async with asyncio.timeout(5):
                while late[0].is_alive:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_cancelled_start_leaves_nothing_behind() -> None:
    async def run() -> None:
        engine = ScriptedEngine("v1", fault=Fault.STALLS)
        checking = asyncio.Event()

        async def check() -> None:
            checking.set()
            await asyncio.Event().wait()

        async def build(_: ServedVersion) -> ScriptedEngine:
            engine.check = check  # type: ignore[method-assign]
            return engine

        starting = asyncio.create_task(Starter(build, 60).start(ServedVersion("v1")))
        await checking.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert not engine.is_alive

    asyncio.run(run())


def test_closing_ends_a_start_and_refuses_the_next() -> None:
    async def run() -> None:
        async def build(_: ServedVersion) -> ScriptedEngine:
            await asyncio.Event().wait()
            raise AssertionError

        starter = Starter(build, 60)
        starting = asyncio.create_task(starter.start(ServedVersion("v1")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await starter.close()
        for attempt in (starting, starter.start(ServedVersion("v1"))):
            with pytest.raises(EngineStartFailed, match="stopping"):
                await attempt

    asyncio.run(run())
