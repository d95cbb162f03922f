"""What a client asks for is no evidence: it takes no version back and hides no bad one; refused, it is its own 4xx."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny_model
from house import api_on_a_port, until
from server import serving
from symbol_gguf import build_symbol_gguf, publish_symbol_version
from upstream import StandIn, standing_in

from chat_app.operations import Operations
from chat_app.serving.deadlines import Timeouts, Waits
from chat_app.serving.engine import Chunk, EngineError, Sampling, ServedVersion, Usage
from chat_app.serving.scripted_engine import Fault, ScriptedEngine
from chat_app.serving.upstream import Upstream
from feedback_store.records import Message

CHAT = "/v1/chat/completions"
ROLES = {"S": "system", "U": "user", "A": "assistant"}
STRICT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""The order of roles that Mistral's template wants."""


def asked(roles: str) -> list[Message]:
    return [Message(role=ROLES[role], content=f"Message {number}.") for number, role in enumerate(roles)]


class Obedient(ScriptedEngine):
    """Says nothing where it is told to, and takes its time over a prompt that is long."""

    async def stream(self, messages: Sequence[Message], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        if sum(len(message["content"]) for message in messages) > 50_000:
            await asyncio.sleep(1.5)
        if any("say nothing" in message["content"] for message in messages):
            yield Chunk("", "stop", Usage(1, 0))
            return
        async for chunk in super().stream(messages, sampling):
            yield chunk


async def build(served: ServedVersion, *, faults: Mapping[str, Fault]) -> Obedient:
    return Obedient(served.version, fault=faults.get(served.version))


@asynccontextmanager
async def house(
    directory: Path, faults: Mapping[str, Fault] | None = None, **settings: object
) -> AsyncIterator[tuple[Operations, httpx.AsyncClient]]:
    """The product on a socket with v1 and v2 published; `faults` says what is wrong with them."""
    for number in (1, 2):
        publish_symbol_version(directory / "versions", number, "smollm2-135m-instruct", canaries=False)
    made = partial(build, faults=faults or {})
    async with (
        api_on_a_port(made, directory, engine="scripted", **settings) as (operations, port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http,
    ):
        yield operations, http


async def ask(http: httpx.AsyncClient, text: str = "How do I begin?", **more: Any) -> httpx.Response:
    return await http.post(CHAT, json={"messages": [{"role": "user", "content": text}], **more})


async def plain(http: httpx.AsyncClient, count: int) -> list[str]:
    """So many answers on the product's own terms, each its id."""
    ids = []
    for number in range(count):
        answer = await ask(http, f"Question {number}?")
        assert answer.status_code == 200, answer.text
        ids.append(answer.json()["id"])
    return ids


def with_system(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": text}, {"role": "user", "content": "Hello"}]}


NOTHING_LEFT = {"stop": ["This is"]}
TRICKS: dict[str, dict[str, Any]] = {
    "a stop text that leaves nothing": NOTHING_LEFT,
    "the same as a stream": {**NOTHING_LEFT, "stream": True},
    "the same asked of the version by its name": {**NOTHING_LEFT, "model": "v1"},
    "one letter to stop at": {"stop": "T"},
    "every letter to stop at": {"stop": ["T", "h", "i", "s"], "max_tokens": 1},
    "a system prompt that says so": with_system("You say nothing."),
    "a message that says so": {"messages": [{"role": "user", "content": "Please say nothing."}]},
    "a made-up history that says so": {
        "messages": [
            {"role": "user", "content": "Please say nothing."},
            {"role": "assistant", "content": "…"},
            {"role": "user", "content": "And now?"},
        ]
    },
    "a word as long as a book": {"messages": [{"role": "user", "content": "word" * 500}]},
    "a text that goes round in circles": {"messages": [{"role": "user", "content": "la," * 300}]},
    "an order of roles": {"messages": asked("AASUSU")},
    "a limit of one": {"max_tokens": 1},
    "heat": {"temperature": 2, "top_p": 0.01, "seed": 1},
}


@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS)
def test_a_healthy_champion_stays_whatever_a_client_asks_of_it(tmp_path: Path, trick: dict[str, Any]) -> None:
    async def run() -> None:
        async with house(tmp_path) as (operations, http):
            await plain(http, 25)
            (await http.post("/v1/versions/v1/promote", json={})).raise_for_status()
            for number in range(16):
                answer = await ask(http, **{"user": f"somebody {number}", **trick})
                assert answer.status_code == 200, answer.text
            await until("nothing is asked again", lambda: not operations.baking.as_body().get("asking_again"), 30)
            await plain(http, 1)
            told = (await http.get("/v1/baking")).json()
            assert (told["state"], told["reasons"]) == ("watching", [])
            assert operations.champion() == operations.answers.slot.version == "v1"
            assert (await http.get("/readyz")).status_code == 200

    asyncio.run(run())


def test_a_prompt_that_is_long_makes_neither_its_own_answer_late_nor_that_of_others(tmp_path: Path) -> None:
    async def run() -> None:
        async with house(tmp_path, max_answers=16, max_answers_per_user=16) as (_, http):
            await plain(http, 25)
            (await http.post("/v1/versions/v1/promote", json={})).raise_for_status()
            await asyncio.gather(*(ask(http, "word " * 15_000) for _ in range(8)))
            told = (await http.get("/v1/baking")).json()
            assert (told["state"], told["reasons"]) == ("watching", [])
            (late,) = (one for one in told["measures"] if one["measure"] == "late")
            assert (late["bad"], late["of"]) == (0, 8)

    asyncio.run(run())


def test_answers_that_a_client_spoilt_before_do_not_hide_a_bad_version(tmp_path: Path) -> None:
    async def run() -> None:
        async with house(tmp_path, {"v1": Fault.EMPTY}) as (operations, http):
            await plain(http, 25)
            for _ in range(210):
                assert (await ask(http, stop=["This is"])).json()["choices"][0]["message"]["content"] == ""
            (await http.post("/v1/versions/v1/promote", json={})).raise_for_status()
            await plain(http, 8)
            await until("it is taken back", lambda: operations.baking.as_body()["state"] == "taken back", 30)
            assert "answers were empty (v0: 0 of 25)" in operations.baking.sentence()

    asyncio.run(run())


def test_a_bad_version_is_not_made_good_by_requests_of_a_clients_own(tmp_path: Path) -> None:
    async def run() -> None:
        async with house(tmp_path, baking_requests=10, baking_s=0.1) as (operations, http):
            (await http.post("/v1/versions/v1/promote", json={})).raise_for_status()
            for _ in range(15):
                await ask(http, max_tokens=1)
            assert operations.baking.as_body()["requests"] == 0
            assert operations.baking.as_body()["state"] == "watching"
            await plain(http, 10)
            await until("it is kept", lambda: operations.baking.as_body()["state"] == "kept")

    asyncio.run(run())


@pytest.mark.parametrize("fault", [Fault.EMPTY, Fault.REPEATS, Fault.DOUBLES, Fault.BREAKS_OFF])
def test_what_a_version_does_on_its_own_terms_still_takes_it_back(tmp_path: Path, fault: Fault) -> None:
    async def run() -> None:
        async with house(tmp_path, {"v1": fault}) as (operations, http):
            await plain(http, 25)
            (await http.post("/v1/versions/v1/promote", json={})).raise_for_status()
            for number in range(8):
                await ask(http, f"Question {number}?")
            await until("it is taken back", lambda: operations.baking.as_body()["state"] == "taken back", 30)
            assert operations.champion() == "v0"

    asyncio.run(run())


def test_failures_count_on_any_terms(tmp_path: Path) -> None:
    async def run() -> None:
        async with house(tmp_path, {"v1": Fault.BREAKS_OFF}) as (operations, http):
            await plain(http, 25)
            (await http.post("/v1/versions/v1/promote", json={})).raise_for_status()
            for _ in range(8):
                await ask(http, temperature=0.2)
            await until("it is taken back", lambda: operations.baking.as_body()["state"] == "taken back", 30)

    asyncio.run(run())


def test_one_client_takes_nothing_back_by_rating_answers_it_had_made(tmp_path: Path) -> None:
    async def run() -> None:
        async with house(tmp_path) as (_, http):
            for answer in await plain(http, 30):
                await http.post("/v1/ratings", json={"candidate_id": answer, "rating": "up"})
            (await http.post("/v1/versions/v1/promote", json={})).raise_for_status()
            for number in range(20):
                answer = (await ask(http, user=f"somebody {number}")).json()["id"]
                (await http.post("/v1/ratings", json={"candidate_id": answer, "rating": "down"})).raise_for_status()
            told = (await http.get("/v1/baking")).json()
            assert (told["state"], told["reasons"]) == ("watching", [])
            (disliked,) = (one for one in told["measures"] if one["measure"] == "disliked")
            assert (disliked["bad"], disliked["of"]) == (2, 2)

    asyncio.run(run())


# --- an order of roles that a chat template refuses -----------------------------------------------------------------

REFUSED = [
    ("UU", None, 1, "user, after user"),
    ("AU", None, 0, "assistant, first"),
    ("USU", None, 1, "system, after user"),
    ("UAAU", None, 2, "assistant, after assistant"),
    ("UAU" + "AU" * 20 + "UAU", None, 43, "user, after user"),
    ("UU", "Be kind.", 1, "user, after user"),
]


def refused_as_the_clients(answer: httpx.Response, index: int, roles: str) -> None:
    assert answer.status_code == 422, answer.text
    assert "retry-after" not in answer.headers
    error = answer.json()["error"]
    assert error["param"] == "messages"
    assert f"messages[{index}] ({roles})" in error["message"]
    assert "\n" not in error["message"]


@pytest.fixture(scope="module")
def strict_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp", reason="the embedded engine is not installed")
    return build_symbol_gguf(tmp_path_factory.mktemp("strict") / "strict.gguf", STRICT)


@pytest.mark.parametrize("system_prompt", [None, "Be kind."])
def test_the_embedded_engine_names_the_message(strict_gguf: Path, tmp_path: Path, system_prompt: str | None) -> None:
    more = {} if system_prompt is None else {"system_prompt": system_prompt}
    publish_symbol_version(tmp_path / "versions", 1, "strict", canaries=False)
    with serving(tmp_path, model=strict_gguf, max_tokens=8, **more) as server:
        assert server.chat("Hello")["choices"][0]["message"]["content"] == "A" * 8
        server.post("/v1/versions/v1/promote")
        for roles, wanted, index, said in REFUSED:
            if wanted == system_prompt:
                for route, stream in ((CHAT, False), (CHAT, True), ("/v1/pairs", False)):
                    body = {"messages": asked(roles)} | ({"stream": True} if stream else {})
                    refused_as_the_clients(server.http.post(route, json=body), index, said)
        told = server.get("/v1/baking")
        assert (told["state"], told["requests"], told["rescued"], told["reasons"]) == ("watching", 0, 0, [])
        assert server.chat("Hello")["choices"][0]["message"]["content"] == "B" * 8
        assert server.http.get("/readyz").status_code == 200
        finished = server.post("/v1/query", {"sql": "SELECT DISTINCT finish_reason FROM candidates"})["rows"]
        assert finished == [["length"]]  # what was refused is no answer of anybody


class Particular(StandIn):
    """A model server whose chat template wants roles to alternate, and says so as vLLM, TGI or an old llama-server."""

    refuses: tuple[int, Any] = (400, {"error": {"message": "Conversation roles must alternate", "code": 400}})

    def _wrong(self, messages: list[dict[str, str]]) -> bool:
        talk = messages[messages[0]["role"] == "system" :]
        return any(one["role"] != ("user", "assistant")[number % 2] for number, one in enumerate(talk))

    def _refusal(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        return self.refuses if self._wrong(body["messages"]) else super()._refusal(body)

    def _route(self, request: Any) -> tuple[int, Any]:
        if request.path in ("/tokenize", "/chat_tokenize") and self._wrong(request.body["messages"]):
            return self.refuses
        return super()._route(request)


TGI_SAYS = 422, {"error": "Template error: roles must alternate", "error_type": "template_error"}
JINJA_SAYS = 500, {"error": {"code": 500, "message": "Jinja Exception: roles must alternate", "type": "server_error"}}


@pytest.mark.parametrize(
    ("kind", "refuses"), [("vllm", Particular.refuses), ("tgi", TGI_SAYS), ("openai", JINJA_SAYS)], ids=str
)
def test_a_model_servers_refusal_is_the_clients_and_opens_no_breaker(
    tmp_path: Path, kind: Any, refuses: tuple[int, Any]
) -> None:
    stand_in = Particular(kind)
    stand_in.refuses = refuses
    with (
        standing_in(stand_in) as running,
        serving(tmp_path, engine="remote", remote_url=running.url, remote_kind=kind) as server,
    ):
        for _ in range(8):
            answer = server.http.post(CHAT, json={"messages": asked("UU")})
            assert answer.status_code == 422, answer.text
            assert "retry-after" not in answer.headers
            assert "roles must alternate" in answer.json()["error"]["message"]
            named = "messages[1] (user, after user)" in answer.json()["error"]["message"]
            assert named == (kind != "openai")  # which cannot be asked what its template takes
        assert server.chat("Hello")["choices"][0]["finish_reason"] == "stop"


def test_the_in_process_engine_names_the_message(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    base = Path(shutil.copytree(tiny_model.shared_directory(), tmp_path / "base"))
    (base / "chat_template.jinja").write_text(STRICT)
    with serving(tmp_path / "data", engine="transformers", model=base, max_tokens=4) as server:
        for roles, wanted, index, said in REFUSED:
            if wanted is None:
                refused_as_the_clients(server.http.post(CHAT, json={"messages": asked(roles)}), index, said)
        assert server.http.post(CHAT, json={"messages": asked("UAU")}).status_code == 200


@pytest.mark.parametrize(
    ("fault", "messages", "said"),
    [
        ("drip", asked("U"), "not finished within"),  # it writes, and does not end
        ("stall_first", [Message(role="user", content="word " * 10_000)], "no first token within"),
    ],
)
def test_what_is_as_long_as_clients_want_it_opens_no_breaker(fault: str, messages: list[Message], said: str) -> None:
    async def run() -> None:
        with standing_in(StandIn()) as stand_in:
            total_s, first_token_s = (0.4, 5.0) if fault == "drip" else (20.0, 0.4)
            timeouts = Timeouts(connect_s=5, first_token_s=first_token_s, between_s=5, total_s=total_s)
            upstream = Upstream(stand_in.url, timeouts=timeouts)
            await upstream.probe()
            stand_in.always = fault
            for _ in range(6):
                with pytest.raises(EngineError, match=said) as caught:
                    async for _ in upstream.stream("base-model", messages, Sampling(max_tokens=4000), Waits()):
                        pass
                assert caught.value.by_length  # type: ignore[attr-defined]
            assert not upstream.breaker.is_open

    asyncio.run(run())


def test_more_tokens_than_the_model_can_have_are_refused_with_the_number(strict_gguf: Path, tmp_path: Path) -> None:
    with serving(tmp_path, model=strict_gguf, max_tokens=8) as server:
        for wanted in (8193, 10**6, 10**7, 2**31, 2**62):
            status, body = server.refused(CHAT, {"messages": asked("U"), "max_tokens": wanted})
            assert (status, "max_tokens" in body["error"]["message"]) == (400, True)
            assert str(wanted) in body["error"]["message"]
