"""/openapi.json says what every route can answer, errors in our one shape; other methods get 405 and `Allow`."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from asgi_house import api_in_process
from request_fields import Routes

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE", "BREW")
COMMON = {"400", "403", "404", "408", "409", "422", "429", "500", "503"}


async def _document(data_dir: Path) -> Any:
    async with api_in_process(data_dir) as (_, http):
        return (await http.get("/openapi.json")).json()


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return asyncio.run(_document(tmp_path_factory.mktemp("api")))


def test_every_route_names_its_errors_in_our_shape(document: Mapping[str, Any]) -> None:
    for method, path, operation in Routes(document).operations():
        responses = operation["responses"]
        missing = (COMMON | (set() if method == "GET" else {"413", "415"})) - set(responses)
        assert not missing, f"{method} {path}: {missing}"
        for status in COMMON - ({"503"} if path == "/readyz" else set()):
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Error"}, f"{method} {path} {status}"
    assert document["components"]["schemas"]["Error"]["required"] == ["error"]
    assert "ValidationError" not in str(document)


def test_every_other_method_is_405_with_what_is_allowed(tmp_path: Path) -> None:
    async def asked() -> None:
        async with api_in_process(tmp_path) as (_, http):
            document = (await http.get("/openapi.json")).json()
            for path, operations in document["paths"].items():
                has = {method.upper() for method in operations}
                for method in set(METHODS) - has:
                    answer = await http.request(method, path.replace("{", "").replace("}", ""))
                    about = f"{method} {path}"
                    assert answer.status_code == 405, f"{about}: {answer.status_code}"
                    assert {one.strip() for one in answer.headers["allow"].split(",")} == has, about
                    if method != "HEAD":
                        assert answer.json()["error"]["message"].endswith("."), about

    asyncio.run(asked())


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/nothing", "/v1/runs/", "/v1/runs/a/b/c", "/v1/../livez"])
def test_a_path_that_is_not_there_is_404_for_every_method(tmp_path: Path, path: str) -> None:
    async def asked() -> None:
        async with api_in_process(tmp_path) as (_, http):
            for method in METHODS:
                answer = await http.request(method, path)
                if method != "HEAD" and path != "/v1/../livez":
                    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found"), method
                assert answer.status_code < 500, method

    asyncio.run(asked())


def test_a_route_that_takes_no_body_takes_none(tmp_path: Path) -> None:
    async def asked() -> None:
        async with api_in_process(tmp_path) as (_, http):
            for method, path, operation in Routes((await http.get("/openapi.json")).json()).operations():
                if method == "GET":
                    continue
                assert "requestBody" in operation, f"{method} {path}: a body would be ignored"
                named = path.replace("{", "").replace("}", "")
                answer = await http.request(method, named, json={"no such key": 1})
                if path != "/v1/chat/completions":  # clients send many keys there
                    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid"), f"{method} {path}"

    asyncio.run(asked())
