"""The engine `remote` against a model server that misbehaves (`upstream.py`): errors, limits, swaps, secrets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from server import environment, free_port, serving
from upstream import StandIn, standing_in

from chat_app.admission import Admission
from chat_app.answers import Answers
from chat_app.baking_watch import Baking
from chat_app.engines import CannotServe, base_model, engine_builder, remote_builder
from chat_app.metrics import Metrics
from chat_app.serving.deadlines import Timeouts
from chat_app.serving.engine import (
    ContextOverflow,
    EngineBroken,
    EngineBusy,
    EngineError,
    EngineRefused,
    EngineStartFailed,
    EngineTimeout,
    Sampling,
    ServedVersion,
    VersionUnservable,
)
from chat_app.serving.remote_engine import RemoteBuilder, RemoteEngine
from chat_app.serving.slot import ModelSlot
from chat_app.serving.upstream import Upstream
from chat_app.settings import SettingsError, load_settings
from chat_app.turns import TurnStream
from feedback_store.records import Message
from feedback_store.store import FeedbackStore

HELLO: list[Message] = [{"role": "user", "content": "Say something."}]
PLAIN = Sampling(seed=3)
QUICK = Timeouts(connect_s=1.0, first_token_s=0.6, between_s=0.3, total_s=1.2)
PATIENT = Timeouts(connect_s=5.0, first_token_s=20.0, between_s=20.0, total_s=60.0)
BASE = ServedVersion("v0")
SECRET = "sk-this-is-the-secret-4711"


def adapted(version: str) -> ServedVersion:
    return ServedVersion(version, adapter_directory=Path(f"/here/versions/{version}/adapter"))


async def never(_: str, __: str) -> bool:
    return False


def builder(*stand_ins: StandIn, timeouts: Timeouts = PATIENT, **more: Any) -> RemoteBuilder:
    upstreams = [Upstream(one.url, key=one.key or "", timeouts=timeouts) for one in stand_ins]
    return RemoteBuilder(upstreams, **more)


@pytest.fixture
def vllm() -> Iterator[StandIn]:
    with standing_in(StandIn()) as stand_in:
        yield stand_in


@pytest.fixture
def tgi() -> Iterator[StandIn]:
    with standing_in(StandIn("tgi")) as stand_in:
        yield stand_in


@asynccontextmanager
async def engine_on(stand_in: StandIn, timeouts: Timeouts = PATIENT) -> AsyncIterator[RemoteEngine]:
    engine = await builder(stand_in, timeouts=timeouts)(BASE)
    try:
        yield engine
    finally:
        await engine.close()


async def said(engine: Any, sampling: Sampling = PLAIN, messages: list[Message] = HELLO) -> str:
    return "".join([chunk.text async for chunk in engine.stream(messages, sampling)])


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 (another thread: no Event)
            await asyncio.sleep(0.01)


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await work

    return asyncio.run(main())


# --- a plain answer --------------------------------------------------------------------------------------------------


def test_an_answer_with_its_usage_and_limits(vllm: StandIn) -> None:
    async def work() -> None:
        async with engine_on(vllm) as engine:
            await engine.check()
            chunks = [chunk async for chunk in engine.stream(HELLO, PLAIN)]
            assert "".join(chunk.text for chunk in chunks) == "".join(f"base-model:3:{index} " for index in range(5))
            assert [chunk.finish_reason for chunk in chunks] == [None] * 5 + ["stop"]
            usage = chunks[-1].usage
            assert usage is not None
            assert (usage.prompt_tokens, usage.completion_tokens) == (2, 5)
            assert (engine.context_tokens, await engine.prompt_tokens(HELLO)) == (4096, 2)
            assert await said(engine, Sampling(seed=4)) != await said(engine, PLAIN) == await said(engine, PLAIN)
            cut = [chunk async for chunk in engine.stream(HELLO, Sampling(seed=3, max_tokens=2))]
            assert (cut[-1].finish_reason, len(cut)) == ("length", 3)
            assert await said(engine, Sampling(seed=3, stop=(":1",))) == "base-model:3:0 base-model:3"
            assert engine.is_alive
        assert not engine.is_alive
        with pytest.raises(EngineBroken, match="was closed"):
            await said(engine)

    run(work())
    asked = vllm.chats[-1].body
    assert asked["model"] == "base-model"
    assert (asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (-1, 0.0, 1.0)


@pytest.mark.parametrize("strange", ["a\u2028b", "a\u0085b", "€ 𝄞 ü"])
def test_text_comes_as_it_was_sent(vllm: StandIn, strange: str) -> None:
    vllm.model = strange

    async def work() -> None:
        async with engine_on(vllm) as engine:
            assert await said(engine) == "".join(f"{strange}:3:{index} " for index in range(5))

    run(work())


# --- misbehaviour ----------------------------------------------------------------------------------------------------

TRIES = 3
FAULTS: list[tuple[str, type[EngineError], str, int]] = [
    ("500", EngineBroken, "failed (500): EngineCore encountered an issue", TRIES),
    ("429", EngineBusy, "is busy (429): Model is overloaded", 1),
    ("429_soon", EngineBusy, "is busy (429)", TRIES),
    ("503", EngineBusy, "is busy (503): try later", TRIES),
    ("reset", EngineBroken, "the connection to vLLM", TRIES),
    ("redirect", EngineRefused, "redirects to http://elsewhere.invalid/v1/chat/completions, which is not followed", 1),
    ("teapot", EngineRefused, "refused the request (418): I am a teapot", 1),
    ("html", EngineBroken, "text/html", 1),
    ("gzip", EngineBroken, "compressed (gzip)", 1),
    ("stall_headers", EngineTimeout, "no first token within 0.6 s", 1),
    ("stall_first", EngineTimeout, "no first token within 0.6 s", 1),
    ("stall_after", EngineTimeout, "nothing new for 0.3 s", 1),
    ("empty_flood", EngineTimeout, "nothing new for 0.3 s", 1),
    ("comments", EngineTimeout, "nothing new for 0.3 s", 1),
    ("drip", EngineTimeout, "not finished within 1.2 s", 1),
    ("garbage", EngineBroken, "no event of a chat completion", 1),
    ("no_object", EngineBroken, "no event of a chat completion", 1),
    ("number_as_text", EngineBroken, "no event of a chat completion", 1),
    ("other_object", EngineBroken, "broke off its answer: old vLLM", 1),
    ("error_event", EngineBroken, "broke off its answer: CUDA out of memory", 1),
    ("half_utf8", EngineBroken, "no UTF-8", 1),
    ("half_utf8_at_end", EngineBroken, "no UTF-8", 1),
    ("huge_line", EngineBroken, "a line of more than 1048576", 1),
    ("no_finish", EngineBroken, "without a finish_reason", 1),
    ("cut", EngineBroken, "the connection to vLLM", 1),
    ("abort", EngineBroken, "its finish_reason is 'abort'", 1),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeedbackStore]:
    with FeedbackStore.open(tmp_path_factory.mktemp("store") / "store.duckdb") as opened:
        yield opened


@pytest.mark.parametrize(("fault", "kind", "message", "requests"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_each_fault_is_one_clear_error_and_never_a_complete_answer(
    vllm: StandIn, store: FeedbackStore, fault: str, kind: type[EngineError], message: str, requests: int
) -> None:
    """Through the product: the answer that is stored is an error, in bounded time, tried again only before a token."""

    async def work() -> float:
        # More time for what is tried again: the pauses are random.
        timeouts = QUICK if requests == 1 else PATIENT
        slot = ModelSlot(builder(vllm, timeouts=timeouts))
        await slot.start(BASE)
        metrics = Metrics()
        admission = Admission(at_once=4, per_user=4, max_waiting=4, tokens_per_minute=0, metrics=metrics)
        baking = Baking(load_settings({}), store, slot, metrics, never)
        answers = Answers(store, slot, "local", admission, metrics, watcher=baking)
        vllm.requests.clear()
        vllm.always = fault
        watched: list[TurnStream] = []

        async def watch() -> None:
            async for growing in answers.stream(HELLO, PLAIN):
                watched[:] = [growing]

        began = time.monotonic()
        with pytest.raises(kind) as caught:
            await watch()
        took_s = time.monotonic() - began
        assert type(caught.value) is kind
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        await answers.settled()
        await answers.close()
        assert store.load_candidate(watched[0].candidate_id).finish_reason == "error"
        return took_s

    assert run(work()) < 5
    assert len(vllm.chats) == requests


@pytest.mark.parametrize("fault", ["no_done", "cut_after_finish"])
def test_what_goes_wrong_after_the_finish_reason_does_not_matter(vllm: StandIn, fault: str) -> None:
    async def work() -> None:
        async with engine_on(vllm) as engine:
            vllm.faults.append(fault)
            chunks = [chunk async for chunk in engine.stream(HELLO, PLAIN)]
            assert chunks[-1].finish_reason == "stop"
            assert len(chunks) == 6

    run(work())


@pytest.mark.parametrize("faults", [["500"], ["reset", "500"], ["429_soon", "429_soon"]])
def test_what_passes_before_the_first_token_is_not_noticed(vllm: StandIn, faults: list[str]) -> None:
    async def work() -> None:
        async with engine_on(vllm) as engine:
            vllm.faults.extend(faults)
            assert await said(engine) == await said(engine)

    run(work())
    assert len(vllm.chats) == len(faults) + 2


def test_a_busy_server_says_when_to_come_back(vllm: StandIn) -> None:
    async def work() -> None:
        async with engine_on(vllm) as engine:
            vllm.always = "429"
            with pytest.raises(EngineBusy) as caught:
                await said(engine)
            assert (caught.value.retry_after_s, caught.value.yours) == (7.0, False)

    run(work())


def test_a_server_that_is_away_is_said_at_once_and_the_breaker_opens_and_recovers() -> None:
    now = [0.0]
    port = free_port()

    async def fail(engine: RemoteEngine, kind: type[EngineError]) -> str:
        with pytest.raises(kind) as caught:
            await said(engine)
        return str(caught.value)

    async def work() -> None:
        with standing_in(StandIn(port=port)) as stand_in:
            upstream = Upstream(stand_in.url, timeouts=PATIENT, clock=lambda: now[0])
            engine = await RemoteBuilder([upstream])(BASE)
        for _ in range(5):
            assert "cannot be reached" in await fail(engine, EngineBroken)
        assert engine.is_alive
        with standing_in(StandIn(port=port)) as stand_in:
            now[0] += 3
            assert await fail(engine, EngineBusy) == (
                f"the model server {upstream.url} failed 5 times in a row; next try in 12 s"
            )
            assert stand_in.requests == []
            now[0] += 12
            assert await said(engine)
            assert await said(engine)

    run(work())


def test_a_server_that_takes_no_connection_is_given_up_after_the_limit(vllm: StandIn) -> None:
    """A listener whose queue is full drops what else knocks, as a host that is off does."""

    async def work() -> None:
        limits = Timeouts(connect_s=0.2, first_token_s=2.0)
        async with engine_on(vllm, limits) as engine:
            with socket.socket() as full, ExitStack() as queue:
                full.bind(("127.0.0.1", 0))
                full.listen(0)
                for _ in range(3):
                    knocking = queue.enter_context(socket.socket())
                    knocking.setblocking(False)
                    knocking.connect_ex(full.getsockname())
                engine.upstream.url = f"http://127.0.0.1:{full.getsockname()[1]}"
                with pytest.raises(EngineTimeout, match=r"no connection within 0\.2 s"):
                    await said(engine)

    run(work())


def test_streams_that_are_broken_off_open_the_breaker_and_people_who_leave_do_not(vllm: StandIn) -> None:
    async def work() -> None:
        async with engine_on(vllm) as engine:
            for _ in range(8):
                async with aclosing(engine.stream(HELLO, PLAIN)) as stream:
                    await anext(stream)
            assert await said(engine)
            vllm.always = "no_finish"
            for _ in range(5):
                with pytest.raises(EngineBroken, match="finish_reason"):
                    await said(engine)
            with pytest.raises(EngineBusy, match="failed 5 times"):
                await said(engine)

    run(work())


def test_300_people_leave_at_random_tokens_and_nothing_stays_behind(vllm: StandIn) -> None:
    vllm.words, vllm.token_s = 500, 0.002
    dice = random.Random(0)

    async def leave(engine: RemoteEngine, tokens: int, *, by_cancelling: bool) -> None:
        async def read() -> None:
            async with aclosing(engine.stream(HELLO, PLAIN)) as stream:
                seen = 0
                async for _ in stream:
                    seen += 1
                    if seen >= tokens:
                        if not by_cancelling:
                            return
                        arrived.set()

        arrived = asyncio.Event()
        reading = asyncio.create_task(read())
        if by_cancelling:
            await arrived.wait()
            reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)

    async def work() -> None:
        async with engine_on(vllm) as engine:
            for _ in range(6):
                people = [leave(engine, dice.randint(1, 20), by_cancelling=bool(n % 2)) for n in range(50)]
                await asyncio.gather(*people)
            await until(lambda: vllm.generating == 0 and vllm.open_connections == 0)

    run(work())
    assert len(vllm.chats) == 300
    assert vllm.closes_seen == 300
    assert vllm.most_generating > 10


def test_closing_the_engine_ends_its_streams_and_not_those_of_another(vllm: StandIn) -> None:
    vllm.token_s = 0.05

    async def work() -> None:
        build = builder(vllm)
        one, other = await build(BASE), await build(BASE)
        vllm.always = "stall_after"
        async with aclosing(one.stream(HELLO, PLAIN)) as stream:
            await anext(stream)
            vllm.always = None
            others = asyncio.create_task(said(other))
            await until(lambda: vllm.generating == 2)
            closing = asyncio.get_running_loop().call_later(0.05, lambda: asyncio.ensure_future(one.close()))
            with pytest.raises(EngineBroken, match="its engine was closed"):
                [chunk async for chunk in stream]
            assert closing.when()
        assert (await others).count("base-model") == 5
        for _ in range(6):  # a closed engine is no failure of the server
            assert await said(other)
        await other.close()
        await until(lambda: vllm.generating == 0)

    run(work())


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_the_hugging_face_token_never_leaves_and_offline_mode_and_proxies_do_not_matter(vllm: StandIn) -> None:
    """In a process of its own: the hub's library reads its environment when it is imported."""
    script = f"""
        import asyncio
        from chat_app.serving.engine import Sampling, ServedVersion
        from chat_app.serving.remote_engine import RemoteBuilder
        from chat_app.serving.upstream import Upstream

        async def main():
            engine = await RemoteBuilder([Upstream({vllm.url!r})])(ServedVersion("v0"))
            async for chunk in engine.stream([{{"role": "user", "content": "Hello"}}], Sampling(seed=1)):
                print(chunk.text, end="")

        asyncio.run(main())
    """
    token = "hf_" + "t" * 34
    nowhere = f"http://127.0.0.1:{free_port()}"
    trap = {"HF_TOKEN": token, "HUGGING_FACE_HUB_TOKEN": token, "HF_HUB_OFFLINE": "1", "HTTP_PROXY": nowhere}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | trap | {"ALL_PROXY": nowhere}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("base-model:1:0 ")
    assert len(vllm.chats) == 1
    assert all(token.encode() not in request.raw for request in vllm.requests)
    assert {request.headers["authorization"] for request in vllm.requests} == {"Bearer no-key"}
    agents = {request.headers["user-agent"] for request in vllm.requests}
    assert agents == {"zephyr-loop"}


def test_the_key_is_sent_and_never_shown(vllm: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    vllm.key = SECRET

    async def work() -> list[str]:
        build = builder(vllm)
        engine = await build(BASE)
        assert await said(engine)
        shown = [repr(engine.upstream), repr(engine), str(vars(engine.upstream.breaker))]
        vllm.key = "another"  # the stand-in repeats the key it refuses
        with pytest.raises(EngineRefused, match=r"refused our key \(401\): set ZLOOP_REMOTE_KEY") as caught:
            await said(engine)
        shown.append(repr(caught.value))
        vllm.key, vllm.always = SECRET, "500"
        with pytest.raises(EngineBroken) as broken:
            await said(engine)
        return [*shown, repr(broken.value), caplog.text]

    assert not [text for text in run(work()) if SECRET in text]
    assert vllm.chats[0].headers["authorization"] == f"Bearer {SECRET}"


# --- vLLM: adapters while it runs ------------------------------------------------------------------------------------


def test_a_swap_loads_under_a_new_name_drains_and_unloads_while_people_chat(vllm: StandIn) -> None:
    vllm.token_s, vllm.words = 0.003, 30
    swapped = asyncio.Event()

    async def chat(slot: ModelSlot) -> list[tuple[str, str]]:
        seen = []
        while not swapped.is_set():
            async with slot.pin() as engine:
                assert isinstance(engine, RemoteEngine)
                seen.append((engine.model, await said(engine)))
        return seen

    async def work() -> None:
        build = builder(vllm, adapter_root=PurePosixPath("/versions"), owner="me")
        slot = ModelSlot(build, keep_warm=False)
        await slot.start(BASE)
        people = [asyncio.create_task(chat(slot)) for _ in range(8)]
        for version in ("v1", "v2", "v1"):
            await slot.swap(adapted(version))
            await until(lambda: slot.draining == 0)
            assert len(vllm.adapters) == 1
        swapped.set()
        answers = [answer for seen in await asyncio.gather(*people) for answer in seen]
        for model, text in answers:
            assert text == "".join(f"{model}:3:{index} " for index in range(30))
        assert len({model for model, _ in answers}) == 4
        await slot.close()

    run(work())
    loads = [request.body for request in vllm.of("/v1/load_lora_adapter") if request.method == "POST"]
    assert [load["lora_path"] for load in loads] == [f"/versions/{version}/adapter" for version in ("v1", "v2", "v1")]
    assert [load["lora_name"].rpartition("-")[0] for load in loads] == ["zloop-me-v1", "zloop-me-v2", "zloop-me-v1"]
    assert len({load["lora_name"] for load in loads}) == 3
    assert vllm.adapters == {}
    assert vllm.unloaded_while_used == []


def test_what_an_earlier_run_left_is_unloaded_and_what_is_not_ours_stays(vllm: StandIn) -> None:
    vllm.adapters = {"zloop-me-v9-abcdef": "/x", "zloop-you-v9-abcdef": "/y", "theirs": "/z"}
    run(builder(vllm, owner="me").inspect())  # `zloop doctor` beside a running server
    assert len(vllm.adapters) == 3
    run(builder(vllm, owner="me").configure())
    assert set(vllm.adapters) == {"zloop-you-v9-abcdef", "theirs"}


def test_an_adapter_a_restarted_vllm_forgot_is_loaded_again_once_for_all(vllm: StandIn) -> None:
    async def work() -> None:
        engine = await builder(vllm)(adapted("v1"))
        before = engine.model
        vllm.adapters.clear()
        texts = await asyncio.gather(*(said(engine) for _ in range(4)))
        assert engine.model != before
        assert {text.split(":")[0] for text in texts} == {engine.model}
        assert list(vllm.adapters) == [engine.model]
        await engine.close()

    run(work())
    assert vllm.adapters == {}


def test_a_version_vllm_cannot_load_is_refused_before_anything_changes(vllm: StandIn) -> None:
    async def work() -> str:
        slot = ModelSlot(builder(vllm))
        await slot.start(BASE)
        vllm.adapter_error = (500, "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora.")
        with pytest.raises(VersionUnservable) as caught:
            await slot.swap(adapted("v3"))
        assert slot.version == "v0"
        async with slot.pin() as engine:
            assert await said(engine)
        await slot.close()
        return str(caught.value)

    message = run(work())
    assert message.startswith("cannot serve v3: ")
    for part in ("LoRA is not enabled", "/here/versions/v3/adapter", "ZLOOP_REMOTE_ADAPTER_DIR", "--max-lora-rank"):
        assert part in message


def test_a_vllm_that_cannot_load_while_it_runs_says_so_at_the_start(vllm: StandIn) -> None:
    vllm.runtime_lora = False

    async def work() -> tuple[list[str], str]:
        build = builder(vllm)
        limits = await build.inspect()
        with pytest.raises(VersionUnservable) as caught:
            await build(adapted("v3"))
        return limits, str(caught.value)

    limits, message = run(work())
    assert len(limits) == 1
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in limits[0]
    assert message == f"cannot serve v3: {limits[0]}"


# --- TGI and servers that cannot load --------------------------------------------------------------------------------


def test_tgi_serves_the_base_and_the_adapters_it_was_started_with(tgi: StandIn) -> None:
    tgi.launch_adapters = ("v1",)

    async def work() -> None:
        build = builder(tgi)
        assert ["LORA_ADAPTERS=v3=/versions/v3/adapter" in limit for limit in await build.inspect()] == [True]
        base, adapter = await build(BASE), await build(adapted("v1"))
        assert (base.model, adapter.model) == ("tgi", "v1")
        assert (await said(adapter)).startswith("v1:3:0")
        chunks = [chunk async for chunk in base.stream(HELLO, Sampling(seed=3, top_p=1.0))]
        assert chunks[-1].finish_reason == "stop"  # TGI says eos_token
        assert "top_p" not in tgi.chats[-1].body
        chunks = [chunk async for chunk in base.stream(HELLO, Sampling(seed=3, stop=(":2",)))]
        assert "".join(chunk.text for chunk in chunks) == "base-model:3:0 base-model:3:1 base-model:3"
        assert chunks[-1].finish_reason == "stop"
        assert (base.context_tokens, await base.prompt_tokens(HELLO)) == (4096, 2)
        with pytest.raises(VersionUnservable, match=r"cannot serve v2: TGI at .* takes adapters only when it starts"):
            await build(adapted("v2"))  # TGI itself would have answered, as the base

    run(work())


def test_blue_green_between_two_tgis(tgi: StandIn) -> None:
    """v1 is started on the idle URL by hand; the promotion goes there, the roll back returns."""

    async def work(green_port: int) -> None:
        green_url = Upstream(f"http://127.0.0.1:{green_port}", timeouts=PATIENT)
        build = RemoteBuilder([Upstream(tgi.url, timeouts=PATIENT), green_url])
        assert ["cannot be reached" in limit for limit in await build.inspect()] == [False, True]
        slot = ModelSlot(build)
        await slot.start(BASE)
        with pytest.raises(VersionUnservable, match=r"cannot serve v1: .*takes adapters only.*cannot be reached"):
            await slot.swap(adapted("v1"))
        with standing_in(StandIn("tgi", launch_adapters=("v1",), port=green_port)) as green:
            await slot.swap(adapted("v1"))
            async with slot.pin() as engine:
                assert (await said(engine)).startswith("v1:3:0")
            assert [request.body["model"] for request in green.chats if request.body["stream"]] == ["v1", "v1"]
            assert await slot.swap(BASE) == "v1"
        async with slot.pin() as engine:
            assert (await said(engine)).startswith("base-model:3:0")
        await slot.close()

    run(work(free_port()))


def test_a_server_that_cannot_load_serves_the_versions_it_lists() -> None:
    async def work(blue: StandIn, green: StandIn) -> None:
        build = builder(blue, green)
        limits = await build.inspect()
        assert [("only those that its /v1/models lists" in limit) for limit in limits] == [True, True]
        engine = await build(adapted("v1"))
        assert (engine.model, engine.upstream.url) == ("v1", green.url)
        assert (await build(BASE)).upstream.url == blue.url
        with pytest.raises(EngineStartFailed, match="lists no base model: name it with ZLOOP_MODEL"):
            await builder(green, blue).inspect()  # v1 must not be taken for the base
        alone = builder(green, base="base-model")
        assert (await alone(adapted("v1"))).model == "v1"
        with pytest.raises(VersionUnservable, match="cannot serve v0"):
            await alone(BASE)
        with pytest.raises(VersionUnservable, match="cannot serve v2"):
            await build(adapted("v2"))
        whole = ServedVersion("v1", checkpoint=Path("/here/versions/v1/model"))
        assert (await build(whole)).model == "v1"
        with pytest.raises(VersionUnservable, match=r"Start one with /here/versions/v1/model under the name v1"):
            await builder(blue)(whole)  # never the base in its place

    with ExitStack() as stack:
        blue = stack.enter_context(standing_in(StandIn("openai")))
        green = stack.enter_context(standing_in(StandIn("openai", model="v1")))
        run(work(blue, green))


# --- too long --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "tgi"])
def test_an_answer_gets_the_room_there_is_and_a_prompt_without_room_is_refused(kind: Any) -> None:
    async def work(stand_in: StandIn) -> None:
        async with engine_on(stand_in) as engine:
            most: list[Message] = [{"role": "user", "content": "word " * 96}]
            chunks = [chunk async for chunk in engine.stream(most, Sampling(max_tokens=50))]
            assert chunks[-1].finish_reason == "length"
            assert stand_in.chats[-1].body["max_tokens"] == 4
            too_much: list[Message] = [{"role": "user", "content": "word " * 150}]
            with pytest.raises(ContextOverflow) as caught:
                await said(engine, messages=too_much)
            assert (caught.value.prompt_tokens, caught.value.limit) == (150, 100)

    with standing_in(StandIn(kind, max_model_len=100)) as stand_in:
        run(work(stand_in))


# --- configuration ---------------------------------------------------------------------------------------------------


def test_a_base_that_is_not_there_is_said_with_what_is(vllm: StandIn) -> None:
    with pytest.raises(EngineStartFailed, match=r"'zephyr' is not served at .*lists: base-model\. Set ZLOOP_MODEL"):
        run(builder(vllm, base="zephyr").inspect())
    assert run(builder(vllm, base="base-model").inspect()) == []
    with pytest.raises(EngineBroken, match=r"cannot be reached .*: is it running"):
        run(RemoteBuilder([Upstream(f"http://127.0.0.1:{free_port()}")]).configure())


@pytest.mark.parametrize("name", ["base-model", "/models/base-model", "/elsewhere/base-model", "someone/Base-Model"])
def test_the_base_is_known_by_its_name_or_path(vllm: StandIn, name: str) -> None:
    assert run(builder(vllm, base=name)(BASE)).model == "base-model"


def test_the_settings_reach_the_servers_and_name_the_base_to_train(tmp_path: Path) -> None:
    given = {
        "ZLOOP_ENGINE": "remote", "ZLOOP_REMOTE_URL": "http://blue:8000/v1, https://green/v1",
        "ZLOOP_REMOTE_KEY": SECRET,
        "ZLOOP_REMOTE_TIMEOUTS_S": "1,2.5,3,4", "ZLOOP_MODEL": "Owner/Zephyr-7B", "ZLOOP_DATA_DIR": str(tmp_path),
    }  # fmt: skip
    settings = load_settings(given)
    blue, green = remote_builder(settings)._upstreams
    assert (blue.url, green.url) == ("http://blue:8000/v1", "https://green/v1")
    assert blue.timeouts == Timeouts(1, 2.5, 3, 4)
    base = base_model(settings)
    assert (base.name, base.hub_id) == ("owner--zephyr-7b", "Owner/Zephyr-7B")
    assert SECRET not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("URL", "model-server:8000", "must begin with http"),
        ("URL", "http://host:99999", "ort"),
        ("URL", f"http://me:{SECRET}@host/v1", "the key goes into ZLOOP_REMOTE_KEY"),
        ("URL", f"http://host/v1?key={SECRET}", "the key goes into ZLOOP_REMOTE_KEY"),
        ("KEY", f"{SECRET}\nX-Other: 1", "printable ASCII"),
        ("TIMEOUTS_S", "5,60", "ZLOOP_REMOTE_TIMEOUTS_S='5,60'"),
    ],
)
def test_a_bad_setting_is_refused_without_showing_a_secret(name: str, value: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings({f"ZLOOP_REMOTE_{name}": value})
    assert SECRET not in str(caught.value)
    with pytest.raises(SettingsError, match="ZLOOP_ENGINE=remote needs ZLOOP_REMOTE_URL"):
        load_settings({"ZLOOP_ENGINE": "remote"})


def test_serve_and_doctor_against_a_model_server(vllm: StandIn, tmp_path: Path) -> None:
    vllm.key = SECRET
    given: dict[str, object] = {"engine": "remote", "remote_url": vllm.url, "remote_key": SECRET}
    with serving(tmp_path / "data", **given) as server:
        answer = server.chat("Hello there")
        assert answer["choices"][0]["message"]["content"].startswith("base-model:")
        assert (answer["model"], answer["choices"][0]["finish_reason"]) == ("v0", "stop")
        assert answer["usage"]["completion_tokens"] == 5
        assert len(server.pair("Which?")["candidates"]) == 2
        vllm.always = "no_finish"
        status, body = server.refused("/v1/chat/completions", {"messages": HELLO})
        assert status == 503
        assert "without a finish_reason" in body["error"]["message"]
        assert SECRET not in server.log.read_text()
    vllm.always, vllm.runtime_lora = None, False
    command = [sys.executable, "-c", "from chat_app.cli import main; main()", "doctor", "--json"]
    looked = subprocess.run(
        command, env=environment(tmp_path / "data", **given), capture_output=True, text=True, timeout=60, check=False
    )
    findings = {finding["what"]: finding for finding in json.loads(looked.stdout)["findings"]}
    assert findings["model server"]["ok"]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in findings["model server"]["detail"]
    assert SECRET not in looked.stdout + looked.stderr


def test_a_model_server_that_is_not_there_keeps_the_server_from_starting_in_one_sentence(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    settings = load_settings({"ZLOOP_ENGINE": "remote", "ZLOOP_REMOTE_URL": url, "ZLOOP_DATA_DIR": str(tmp_path)})
    with pytest.raises(CannotServe, match=f"^ZLOOP_ENGINE=remote: the model server at {url} cannot be reached"):
        engine_builder(settings)
