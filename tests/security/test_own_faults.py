"""What goes wrong on our side: a sentence, never a bare 500, a silent cut or something half-written."""

import asyncio
import errno
import json
import logging
import os
import resource
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_house import api_in_process
from house import api_on_a_port

from chat_app.operations import Operations
from chat_app.serving.engine import Chunk, Sampling, ServedVersion
from chat_app.serving.scripted_engine import CHECK_WORDS, ScriptedEngine
from feedback_store.durable import write_json
from feedback_store.errors import StoreDamaged
from feedback_store.records import Message
from trainer.errors import EvaluationNotFound, RunNotFound, VersionNotFound
from trainer.runs import Run
from trainer.supervisor import Supervisor
from trainer.versions import Versions

SECRET = "/srv/private/words"
ASKED = {"messages": [{"role": "user", "content": "How do I begin?"}]}
NO_NAMES = (
    "x" * 300,
    "v" + "9" * 300,
    "run_" + "0" * 300,
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc",
    "v1\n",
    "v\u0661",
    "a\x00b",
    "\ud800",
    " ",
    "-x",
    "~",
)


# --- the operating system ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
        (errno.EACCES, "may not"),
        (errno.EROFS, "may not"),
        (errno.EMFILE, "too many files"),
        (errno.EIO, "could not"),
    ],
)
def test_a_schedule_that_cannot_be_written_is_503_and_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, word: str
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number), f"{SECRET}/schedule.json")

    async def changed() -> tuple[httpx.Response, Any, Any]:
        async with api_in_process(tmp_path) as (_, http):
            await http.put("/v1/schedule", json={"every": 7})
            before = (tmp_path / "schedule.json").read_bytes()
            with monkeypatch.context() as patched:
                patched.setattr("feedback_store.durable.os.fsync", refuse)
                answer = await http.put("/v1/schedule", json={"every": 8})
            assert (tmp_path / "schedule.json").read_bytes() == before
            return answer, (await http.get("/v1/schedule")).json(), [path.name for path in tmp_path.iterdir()]  # noqa: ASYNC240

    answer, schedule, left = asyncio.run(changed())
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    error = answer.json()["error"]
    assert error["type"] == "unavailable"
    assert word in error["message"]
    assert SECRET not in answer.text
    assert schedule["every"] == 7
    assert not [name for name in left if name.startswith(".schedule")]


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def test_limits_of_the_system_itself_are_503_and_nothing_is_half_written(tmp_path: Path) -> None:
    async def changed() -> list[httpx.Response]:
        async with api_in_process(tmp_path) as (_, http):
            await http.put("/v1/schedule", json={"every": 7})
            with limited(resource.RLIMIT_FSIZE, 10):
                too_large = await http.put("/v1/schedule", json={"every": 8})
            with limited(resource.RLIMIT_NOFILE, 3):
                too_many = await http.put("/v1/schedule", json={"every": 9})
            after = await http.get("/v1/schedule")
            return [too_large, too_many, after]

    too_large, too_many, after = asyncio.run(changed())
    assert (too_large.status_code, too_many.status_code) == (503, 503)
    assert "too many files" in too_many.json()["error"]["message"]
    assert after.json()["every"] == 7
    assert json.loads((tmp_path / "schedule.json").read_text())["schedule"]["every"] == 7
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_could_not_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    with limited(resource.RLIMIT_FSIZE, 10), pytest.raises(OSError, match="too large"):
        write_json(path, {"a": "x" * 100_000})
    assert [one.name for one in tmp_path.iterdir()] == ["state.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_name_that_is_too_long_for_a_file_is_the_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def asked() -> httpx.Response:
        async with api_in_process(tmp_path) as (operations, http):
            monkeypatch.setattr(operations.data, "backups", Path("x" * 300).stat)
            return await http.get("/v1/backups")

    answer = asyncio.run(asked())
    assert answer.status_code == 422
    assert "too long" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_no_name_from_outside_reaches_the_disk_that_cannot_be_one_of_ours(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunNotFound):
        Run.open(tmp_path, name)
    with pytest.raises(VersionNotFound):
        Versions(tmp_path).load(name)
    supervisor = object.__new__(Supervisor)
    supervisor.data_dir = tmp_path
    with pytest.raises(EvaluationNotFound):
        supervisor.evaluation_directory(name)


# --- our own bugs --------------------------------------------------------------------------------------------------


def test_an_error_nobody_expected_is_one_line_of_ours_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError(f"cannot read {SECRET}")

    async def asked() -> httpx.Response:
        async with api_in_process(tmp_path) as (operations, http):
            monkeypatch.setattr(operations.data, "statistics", fail)
            return await http.get("/v1/statistics")

    with caplog.at_level(logging.WARNING):
        answer = asyncio.run(asked())
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()["error"]) == {"type", "message"}
    assert SECRET not in answer.text
    assert "RuntimeError" not in answer.text
    assert [SECRET in (one.exc_text or "") for one in caplog.records].count(True) == 1


@pytest.mark.parametrize("fails_at", [0, 2])
def test_an_export_that_breaks_is_never_taken_for_a_whole_one(tmp_path: Path, fails_at: int) -> None:
    def lines(_: str) -> Iterator[str]:
        for number in range(fails_at):
            yield f"{number}\n"
        raise OSError(errno.EIO, "Input/output error", SECRET)

    async def asked() -> int | None:
        async with api_on_a_port(sound, tmp_path) as (operations, port):
            operations.data.export_lines = lines  # type: ignore[method-assign]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                try:
                    return (await http.get("/v1/export")).status_code
                except httpx.RemoteProtocolError:
                    return None

    assert asyncio.run(asked()) == (503 if fails_at == 0 else None)


# --- answers -------------------------------------------------------------------------------------------------------


class Breaking(ScriptedEngine):
    """An engine with a bug of ours: after `pieces` of an answer it raises what no engine should."""

    pieces = 3
    says_stop = False

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        number = 0
        async for chunk in super().stream(messages, sampling):
            if sampling.max_tokens > CHECK_WORDS and number == self.pieces:
                break
            yield chunk
            number += 1
        if sampling.max_tokens > CHECK_WORDS:
            if self.says_stop:
                yield Chunk("", "stop")
            raise KeyError(SECRET)


async def sound(served: ServedVersion) -> ScriptedEngine:
    return ScriptedEngine(served.version)


async def breaking(served: ServedVersion) -> Breaking:
    return Breaking(served.version)


async def breaking_at_once(served: ServedVersion) -> Breaking:
    engine = Breaking(served.version)
    engine.pieces = 0
    return engine


async def breaking_after_stop(served: ServedVersion) -> Breaking:
    engine = Breaking(served.version)
    engine.says_stop = True
    return engine


async def kept(operations: Operations, http: httpx.AsyncClient) -> list[str]:
    await operations.answers.settled()
    found = await http.post("/v1/query", json={"sql": "SELECT finish_reason FROM candidates"})
    return [row[0] for row in found.json()["rows"]]


@pytest.mark.parametrize("build", [breaking, breaking_after_stop])
def test_a_stream_that_breaks_ends_with_an_error_event_and_is_stored_as_broken(tmp_path: Path, build: Any) -> None:
    async def asked() -> None:
        async with api_in_process(tmp_path, build) as (operations, http):
            answer = await http.post("/v1/chat/completions", json={**ASKED, "stream": True})
            events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
            assert len(events) >= 2
            last = json.loads(events[-1])
            assert set(last["error"]) == {"type", "message"}
            assert SECRET not in answer.text
            assert "stop" not in [json.loads(one)["choices"][0]["finish_reason"] for one in events[:-1]]
            assert await kept(operations, http) == ["error"]

    asyncio.run(asked())


def test_a_stream_that_breaks_before_its_first_word_is_a_500_of_ours(tmp_path: Path) -> None:
    async def asked() -> None:
        async with api_in_process(tmp_path, breaking_at_once) as (operations, http):
            answer = await http.post("/v1/chat/completions", json={**ASKED, "stream": True})
            if answer.status_code == 200:  # begun, and told in the stream
                last = [line for line in answer.text.splitlines() if line][-1]
                assert "error" in json.loads(last.removeprefix("data: "))
            else:
                assert answer.status_code == 500
                assert answer.json()["error"]["message"]
            assert SECRET not in answer.text
            assert await kept(operations, http) == ["error"]

    asyncio.run(asked())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/pairs"])
def test_whole_answers_that_break_are_500_of_ours_and_stored_as_broken(tmp_path: Path, path: str) -> None:
    async def asked() -> None:
        async with api_in_process(tmp_path, breaking) as (operations, http):
            answer = await http.post(path, json=ASKED)
            assert answer.status_code == 500
            assert answer.json()["error"]["message"].endswith(".")
            assert SECRET not in answer.text
            assert set(await kept(operations, http)) == {"error"}
            assert (await http.post("/v1/query", json={"sql": "FROM pairs"})).json()["rows"] == []

    asyncio.run(asked())


@pytest.mark.parametrize("error", [StoreDamaged("The database cannot be written."), OSError(errno.EIO, SECRET)])
def test_a_streamed_answer_that_cannot_be_stored_says_so_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    async def asked() -> str:
        async with api_in_process(tmp_path) as (operations, http):
            monkeypatch.setattr(operations.answers._store, "record_candidate", refuse)
            return (await http.post("/v1/chat/completions", json={**ASKED, "stream": True})).text

    text = asyncio.run(asked())
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert "error" in json.loads(events[-1])
    assert "[DONE]" not in events
    assert SECRET not in text


def test_what_our_own_code_breaks_is_no_answer_that_a_person_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def asked() -> list[str]:
        async with api_in_process(tmp_path) as (operations, http):

            def fail(*_: Any) -> None:
                raise RuntimeError(SECRET)

            with monkeypatch.context() as patched:
                patched.setattr(operations.answers, "_note_words", fail)
                for path in ("/v1/chat/completions", "/v1/pairs"):
                    assert (await http.post(path, json=ASKED)).status_code == 500
            return await kept(operations, http)

    assert asyncio.run(asked()) == ["error"] * 3
