"""Every text field of every route, as /openapi.json names them, against strings that break programs: no server error.

Our own list always runs; the Big List of Naughty Strings and JSONTestSuite where ../shared/cases has them.
"""

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from asgi_house import api_in_process
from request_fields import HEADERS, Request, Routes

CORPORA = Path(__file__).parents[3] / "shared" / "cases" / "corpora"
needs_corpora = pytest.mark.skipif(not CORPORA.is_dir(), reason="BLNS and JSONTestSuite are not in ../shared/cases")
LONGEST_IN_URL = 5_001  # httpx sends no longer ones
AT_ONCE = 8
OURS = (
    "\ud800",
    "a\udfff",
    "\udc00\ud800",
    "\x00",
    "a\x00b",
    "",
    " ",
    "x" * 300,
    "v" + "9" * 99,
    "v" + "9" * 300,
    "run_" + "a" * 90,
    "é" * 200,
    ".",
    "..",
    "../..",
    "/",
    "/etc/passwd",
    "~",
    "~nobody-of-that-name",
    "%00",
    "%2e%2e%2f",
    "v0\n",
    "\r\nX-Forged: yes",
    "\u202e\u200f\u2066",
    "\ufeff",
    "\uffff\U0010ffff",
    "🏳️‍🌈" * 40,
    "1e400",
    "-0",
    "NaN",
    "9" * 5_000,
    "[" * 10_000,
    "x" * 100_001,
    "'; DROP TABLE picks; --",
    "{{7*7}}",
)


@pytest.fixture(autouse=True)
def far_from_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


async def send(http: httpx.AsyncClient, request: Request) -> httpx.Response:
    return await http.request(request.method, request.path, content=request.body, headers=HEADERS)


def require_told(answer: httpx.Response, about: str) -> None:
    """No server error; a refusal is in our shape, and a sentence."""
    assert answer.status_code < 500, f"{about}: {answer.status_code} {answer.text[:300]}"
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) <= {"type", "message", "param"}, about
        assert error["message"].strip(), about


async def sweep(data_dir: Path, strings: Sequence[str], every: int = 1) -> int:
    """Send each string in each field, a few at once; how many requests that were.

    `every`: each field gets only each so-manieth string, the next field the next ones.
    """
    async with api_in_process(data_dir) as (_, http):
        routes = Routes((await http.get("/openapi.json")).json())
        waiting = (
            (field, text)
            for number, field in enumerate(routes.text_fields())
            for text in strings[number % every :: every]
            if field.where == "body" or len(text) < LONGEST_IN_URL
        )
        sent = 0

        async def work() -> None:
            nonlocal sent
            for field, text in waiting:
                answer = await send(http, routes.request(field, text))
                require_told(answer, f"{field} = {ascii(text)[:80]}")
                sent += 1

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return sent


def test_our_own_strings_in_every_field(tmp_path: Path) -> None:
    assert asyncio.run(sweep(tmp_path / "data", OURS)) > 2_000


@needs_corpora
def test_the_big_list_in_every_field(tmp_path: Path) -> None:
    """With FUZZ=all (`make fuzz`) every string in every field, else each field has an eighth of them."""
    strings = json.loads((CORPORA / "blns.json").read_text(encoding="utf-8"))
    every = 1 if os.environ.get("FUZZ") == "all" else 8
    assert asyncio.run(sweep(tmp_path / "data", strings, every)) > 30_000 // every


async def _every_body(data_dir: Path, bodies: Sequence[tuple[str, bytes]]) -> list[tuple[str, httpx.Response]]:
    async with api_in_process(data_dir) as (_, http):
        routes = Routes((await http.get("/openapi.json")).json())
        found = []
        for method, path, _ in routes.operations():
            for name, body in bodies if method != "GET" else ():
                answer = await send(http, routes.with_body(method, path, body))
                found.append((f"{method} {path} {name}", answer))
    return found


def test_bodies_that_are_no_json_of_ours_are_refused_by_every_route(tmp_path: Path) -> None:
    bodies = {
        "half a surrogate in a key": rb'{"\ud800": 1}',
        "NUL in a key": rb'{"a\u0000": 1}',
        "a number that is too large": b'{"limit": 1e400}',
        "a whole number that is too large": b'{"seed": 9223372036854775808}',
        "NaN": b'{"temperature": NaN}',
        "a key twice": b'{"recipe": null, "recipe": null}',
        "deep": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        "byte order mark": b"\xef\xbb\xbf{}",
        "UTF-16": "{}".encode("utf-16"),
        "UTF-32": "{}".encode("utf-32"),
        "no UTF-8": b'{"a": "\xff"}',
        "cut": b'{"a": "',
        "two documents": b"{}{}",
        "a list": b"[]",
        "a text": b'"x"',
        "many items": b"[" + b"0," * 200_000 + b"0]",
    }
    for about, answer in asyncio.run(_every_body(tmp_path / "data", list(bodies.items()))):
        require_told(answer, about)
        assert answer.status_code == 422, f"{about}: {answer.status_code} {answer.text[:200]}"


@needs_corpora
def test_the_json_suite_as_the_body_of_every_route(tmp_path: Path) -> None:
    files = sorted((CORPORA / "json_parsing").glob("*.json"))
    bodies = [(path.name, body) for path in files if (body := path.read_bytes())]
    for about, answer in asyncio.run(_every_body(tmp_path / "data", bodies)):
        require_told(answer, about)
        if " n_" in about:
            assert answer.status_code in (400, 422), f"{about}: {answer.status_code}"
            assert (
                "JSON" in answer.text
                or "UTF-8" in answer.text
                or "deeper" in answer.text
                or "byte order" in answer.text
            )
        elif " y_" in about and answer.status_code == 422:
            assert "is not JSON" not in answer.text, about


def test_every_text_field_has_a_length_and_every_list_a_number(tmp_path: Path) -> None:
    async def document() -> Routes:
        async with api_in_process(tmp_path) as (_, http):
            return Routes((await http.get("/openapi.json")).json())

    routes = asyncio.run(document())
    for field in routes.text_fields():
        schema = field.schema
        is_text = schema.get("type") == "string"
        assert not is_text or "maxLength" in schema or "enum" in schema or "const" in schema, f"{field}: {schema}"
    for name, schema in routes.lists():
        assert "maxItems" in schema, f"{name}: {schema}"


@pytest.mark.parametrize("size", [5_000_000, 501])
def test_twenty_long_reasons_are_refused(tmp_path: Path, size: int) -> None:
    async def asked() -> httpx.Response:
        async with api_in_process(tmp_path) as (_, http):
            pair = (await http.post("/v1/pairs", json={"messages": [{"role": "user", "content": "Well?"}]})).json()
            answer = await http.post(
                "/v1/picks", json={"pair_id": pair["pair_id"], "pick": "first", "reasons": ["x" * size] * 20}
            )
            kept = await http.post("/v1/query", json={"sql": "SELECT count(*) FROM picks"})
            assert kept.json()["rows"] == [[0]]
            return answer

    answer = asyncio.run(asked())
    require_told(answer, "reasons")
    assert answer.status_code == (422 if size == 501 else 413)


@pytest.mark.parametrize("size", [20_001, 99_999])
def test_an_answer_too_long_for_a_field_is_refused_with_its_place(tmp_path: Path, size: int) -> None:
    async def asked() -> httpx.Response:
        async with api_in_process(tmp_path) as (_, http):
            return await http.post("/v1/ratings", json={"candidate_id": "c", "rating": "up", "comment": "x" * size})

    answer = asyncio.run(asked())
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "comment")
