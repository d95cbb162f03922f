"""Kind 2: pages elsewhere cannot act or read, whatever they send; one layer decides for every path.

Over a real socket, with the headers that a browser sends for each kind of request; `test_foreign_pages.py` does the
same with a real browser.
"""

import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import Server, serving
from tiny_model import build_tiny_gguf

EMPTY = b"{}"
JSON = {"Content-Type": "application/json"}
ACTING = ["/v1/rollback", "/v1/backups", "/v1/runs", "/v1/snapshots", "/v1/datasets", "/v1/versions/v0/promote",
          "/v1/erasures", "/v1/imports", "/v1/picks", "/v1/chat/completions", "/gradio_api/queue/join",
          "/admin/gradio_api/queue/join", "/admin/gradio_api/upload", "/rate/gradio_api/cancel"]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tiny = build_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with serving(tmp_path_factory.mktemp("data"), engine="scripted", model=tiny) as running:
        yield running


def ask(
    server: Server, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request with exactly these headers; Host is ours unless it is given."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    try:
        connection.putrequest(method, path, skip_host="Host" in (headers or {}), skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read(65_536)
    finally:
        connection.close()


FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:1"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "https://127.0.0.1"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"},
]


@pytest.mark.parametrize("path", ACTING)
@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda headers: " ".join(headers.values()))
def test_a_page_elsewhere_cannot_act(server: Server, path: str, foreign: dict[str, str]) -> None:
    status, headers, _ = ask(server, "POST", path, {**JSON, **foreign}, EMPTY)
    assert status == 403
    assert not [name for name in headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", ACTING)
@pytest.mark.parametrize(
    "kind",
    [None, "text/plain", "application/x-www-form-urlencoded", "text/plain; application/json", "application/jsonp"],
)
def test_a_form_cannot_act_even_where_nothing_says_where_it_comes_from(
    server: Server, path: str, kind: str | None
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    assert ask(server, "POST", path, headers, b"")[0] == 415
    assert ask(server, "POST", path, headers, EMPTY)[0] == 415


@pytest.mark.parametrize("path", [path for path in ACTING if "upload" not in path and path != "/v1/imports"])
def test_multipart_is_for_named_routes_alone(server: Server, path: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n'
    assert ask(server, "POST", path, {"Content-Type": "multipart/form-data; boundary=x"}, body)[0] == 415


@pytest.mark.parametrize("path", [*ACTING, "/", "/admin/", "/v1/export", "/v1/nothing", "/anything"])
def test_no_preflight_is_answered(server: Server, path: str) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    status, headers, _ = ask(server, "OPTIONS", path, asked)
    assert status in (403, 404, 405)
    assert not [name for name in headers if name.startswith("access-control-")]


@pytest.mark.parametrize("path", ["/v1/export", "/v1/versions", "/v1/runs", "/config", "/admin/config",
                                  "/gradio_api/queue/data?session_hash=abcdefgh",
                                  "/gradio_api/heartbeat/abcdefgh"])  # fmt: skip
@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda headers: " ".join(headers.values()))
def test_a_page_elsewhere_cannot_read(server: Server, path: str, foreign: dict[str, str]) -> None:
    assert ask(server, "GET", path, foreign)[0] == 403


def test_a_link_elsewhere_leads_to_a_page_and_nowhere_else(server: Server) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    framed = {**link, "Sec-Fetch-Dest": "iframe"}
    for path in ("/", "/rate/", "/admin/"):
        assert ask(server, "GET", path, link)[0] == 200
        assert ask(server, "GET", path, framed)[0] == 403
    assert ask(server, "GET", "/v1/export", link)[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1@evil.example", "evil.example:80",
                                  "[::2]", "0.0.0.0", "localhost\\evil", "", "localhost:80:80"])  # fmt: skip
@pytest.mark.parametrize("path", ["/", "/livez", "/v1/export", "/gradio_api/queue/join"])
def test_another_name_is_refused(server: Server, host: str, path: str) -> None:
    method = "POST" if path.endswith("join") else "GET"
    assert ask(server, method, path, {"Host": host, **JSON})[0] == 400


@pytest.mark.parametrize("origin_of", ["http://localhost:{port}", "http://127.0.0.1:{port}", "http://[::1]:{port}"])
def test_our_own_pages_may_ask(server: Server, origin_of: str) -> None:
    origin = origin_of.format(port=server.url.rsplit(":", 1)[1])
    headers = {**JSON, "Host": origin.removeprefix("http://"), "Origin": origin, "Sec-Fetch-Site": "same-origin"}
    assert ask(server, "POST", "/v1/snapshots", headers, EMPTY)[0] == 409  # there is nothing to freeze: it was asked


def test_nobody_says_for_somebody_else_who_asks(server: Server) -> None:
    forwarded = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https", "Forwarded": "host=evil.example",
                 "X-Gradio-Server": "http://evil.example"}  # fmt: skip
    status, _, page = ask(server, "GET", "/", forwarded)
    assert status == 200
    assert b"evil.example" not in page


def test_a_body_is_bounded_and_complete(server: Server) -> None:
    assert ask(server, "POST", "/v1/picks", {**JSON, "Content-Length": str(10**12)})[0] == 413
    assert ask(server, "POST", "/v1/picks", JSON, b'{"comment": "' + b"x" * 300_000 + b'"}')[0] == 413
    assert ask(server, "POST", "/v1/picks", {**JSON, "Content-Encoding": "gzip"}, EMPTY)[0] == 415
    assert ask(server, "GET", "/v1/versions", {"Content-Length": "2"})[0] == 400


def test_what_is_refused_says_so_in_the_shape_of_every_error(server: Server) -> None:
    for answer in (
        ask(server, "GET", "/v1/nothing"),
        ask(server, "DELETE", "/v1/runs"),
        ask(server, "POST", "/v1/picks", {}, EMPTY),
        ask(server, "POST", "/v1/picks", {**JSON, "Origin": "null"}, EMPTY),
    ):
        error = json.loads(answer[2])["error"]
        assert error["type"]
        assert error["message"].endswith((".", "is."))


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/gradio_api/proxy=http://127.0.0.1",
     "/gradio_api/deep_link?session_hash=abcdefgh", "/gradio_api/info", "/gradio_api/token", "/gradio_api/openapi.json",
     "/monitoring", "/gradio_api/queue/status", "/admin/gradio_api/startup-events", "/gradio_api/app_id",
     "/admin/gradio_api/file=/etc/passwd", "/gradio_api/file%3D/etc/passwd"],
)  # fmt: skip
def test_gradios_other_routes_are_closed(server: Server, path: str) -> None:
    assert ask(server, "GET", path)[0] == 404


@pytest.mark.parametrize("name", ["run/say", "api/say", "call/say", "component_server", "reset", "process_recording"])
@pytest.mark.parametrize("mount", ["", "/rate", "/admin"])
def test_a_handler_is_called_by_the_queue_alone(server: Server, mount: str, name: str) -> None:
    assert ask(server, "POST", f"{mount}/gradio_api/{name}", JSON, b'{"data": []}')[0] == 404


def test_every_route_has_a_rule_or_is_closed(tmp_path: Path) -> None:
    """A new route, ours or Gradio's, fails here until somebody says what it may be asked."""
    from chat_app.guard_rules import CLOSED, RULES

    open_paths = {(method, rule.path) for rule in RULES for method in rule.methods}
    unknown = [
        f"{method} {path}"
        for method, mount, path in _routes(tmp_path)
        if (method, _template(mount + path)) not in {(one, _template(other)) for one, other in open_paths}
        and path.rstrip("/") not in CLOSED
    ]
    assert unknown == []


def test_every_rule_has_a_route(tmp_path: Path) -> None:
    from chat_app.guard_rules import RULES

    there = {_template(mount + path) for _, mount, path in _routes(tmp_path)}
    # `/v1/imports` and the like are matched by name, a page's own path by its mount.
    assert [rule.path for rule in RULES if _template(rule.path) not in there] == []


def _template(path: str) -> str:
    """A path with its parameters unnamed, so that ours and a framework's are alike."""
    return re.sub(r"\{[^}]*\}", "{}", path).rstrip("/") or "/"


LISTING = """
import json, sys
from starlette.routing import Mount
from chat_app.__main__ import create_application, open_store
from chat_app.settings import load_settings

def walk(routes, mount):
    for route in routes:
        if isinstance(route, Mount):
            yield from walk(route.routes, mount + route.path)
        elif getattr(route, "name", "") == "no such route":
            pass
        elif getattr(route, "methods", None):
            yield from ([method, mount, route.path] for method in route.methods)
        elif hasattr(route, "original_router"):
            yield from walk(route.original_router.routes, mount)
        else:
            raise SystemExit(f"a route that cannot be classified: {route!r}")

settings = load_settings({"ZLOOP_DATA_DIR": sys.argv[1], "ZLOOP_ENGINE": "scripted"})
with open_store(settings) as store:
    app = create_application(settings, store, lambda: None, lambda _: None)
    print(json.dumps(list(walk(app.routes, ""))))
"""


def _routes(data_dir: Path) -> list[tuple[str, str, str]]:
    """Every (method, mount, path) of the whole application, Gradio's included. A process of its own: Gradio's loops."""
    said = subprocess.run([sys.executable, "-c", LISTING, str(data_dir)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return [(method, mount, path) for method, mount, path in json.loads(said.stdout.splitlines()[-1])]
