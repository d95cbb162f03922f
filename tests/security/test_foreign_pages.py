"""Kind 2 in a real browser: a page on another name, and one on another port of this machine, do and read nothing.

Each page tries every route of the API and every event of every page in every way a page has: fetch with and without
CORS, with each content type a form can send and with JSON, forms, beacons, images, scripts, frames, event streams.
Then the server is asked what has changed.
"""

import functools
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright
from server import Server, serving
from tiny_model import build_tiny_gguf

pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
             "--host-resolver-rules=MAP evil.test 127.0.0.1"]  # fmt: skip
ATTACK = (Path(__file__).parent / "foreign_page.js").read_text(encoding="utf-8")
MOUNTS = ("", "/rate", "/admin")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


FOREIGN = {"127.0.0.1": ("evil.test", "127.0.0.1"), "127.0.0.2": ("evil.test",), "::1": ("localhost",)}
"""Where our server is → where the pages are that try it."""


@pytest.fixture(scope="module", params=FOREIGN)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On names that are called localhost, and on one that is not."""
    tiny = build_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    data = tmp_path_factory.mktemp("data")
    with serving(data, engine="scripted", model=tiny, host=request.param) as running:
        yield running


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves one page, and logs nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(f"<!doctype html><title>foreign</title><script>{ATTACK}</script>".encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def foreign_page() -> Iterator[int]:
    """The port of a server that is not ours."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet)) as elsewhere:
        serving_ = threading.Thread(target=elsewhere.serve_forever)
        serving_.start()
        try:
            yield elsewhere.server_port
        finally:
            elsewhere.shutdown()
            serving_.join()


def targets(server: Server) -> list[dict[str, Any]]:
    """Every route of the API with a body that would do something, and every event of every page."""
    found: list[dict[str, Any]] = []
    for path, operations in server.get("/openapi.json")["paths"].items():
        filled = re.sub(r"\{version\}", "v0", path)
        filled = re.sub(r"\{[^}]*\}", "x", filled)
        found += [{"method": method.upper(), "path": filled, "body": BODIES.get(path, {})} for method in operations]
    for mount in MOUNTS:
        for event in server.get(f"{mount}/config")["dependencies"]:
            body = {"data": ["x"] * len(event["inputs"]), "fn_index": event["id"], "session_hash": "foreign00"}
            found.append({"method": "POST", "path": f"{mount}/gradio_api/queue/join", "body": body})
        posts = ("run/x", "api/x", "call/x", "upload", "cancel", "component_server", "reset")
        found += [{"method": "POST", "path": f"{mount}/gradio_api/{path}", "body": {}} for path in posts]
        gets = ("/", "/config", "/gradio_api/heartbeat/foreign00", "/gradio_api/queue/data?session_hash=foreign00")
        found += [{"method": "GET", "path": mount + path, "body": None} for path in gets]
    return found


MESSAGES = [{"role": "user", "content": "from elsewhere"}]
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/pairs": {"messages": MESSAGES},
    "/v1/learning": {"scope": "rater", "subject": "local", "learn": False},
    "/v1/erasures": {"rater": "local"},
    "/v1/schedule": {"every": 1},
    "/v1/quarantine": {"rater": "local", "quarantined": True},
    "/v1/query": {"sql": "SELECT 1"},
}


def state(server: Server) -> dict[str, Any]:
    """Everything a request could have changed: rows, files, runs, versions, the champion, what was answered."""
    tables = server.post("/v1/query", {"sql": "SELECT table_name FROM information_schema.tables ORDER BY 1"})["rows"]
    counting = " UNION ALL ".join(f"SELECT '{name}', count(*) FROM \"{name}\"" for (name,) in tables)
    counts = sorted(server.post("/v1/query", {"sql": counting})["rows"])
    root = server.log.parent
    files = sorted(str(one.relative_to(root)) for one in root.rglob("*") if "store.duckdb" not in one.name)
    answered = [line for line in server.http.get("/metrics").text.splitlines() if re.match(r"zloop_\w*answers", line)]
    return {"rows": counts, "files": files, "runs": server.get("/v1/runs"), "versions": server.get("/v1/versions"),
            "schedule": server.get("/v1/schedule"), "backups": server.get("/v1/backups"),
            "answers": sorted(answered)}  # fmt: skip


def test_a_page_elsewhere_does_nothing_and_reads_nothing(
    browser: Browser, server: Server, request: pytest.FixtureRequest
) -> None:
    wanted = targets(server)
    assert len(wanted) > 120
    before = state(server)
    for name in FOREIGN[request.node.callspec.params["server"]]:
        with foreign_page() as port:
            context = browser.new_context()
            page = context.new_page()
            page.goto(f"http://{name}:{port}/")
            read = page.evaluate("([ours, targets]) => attack(ours, targets)", [server.url, wanted])
            context.close()
        assert read == []
    assert state(server) == before


def test_our_pages_under_a_foreign_name_are_not_shown(browser: Browser, server: Server) -> None:
    """A name that begins to mean this machine after a page of it was loaded (DNS rebinding)."""
    if "127.0.0.1" not in server.url:
        return  # the foreign name is made to mean 127.0.0.1 alone
    context = browser.new_context()
    answer = context.new_page().goto(f"http://evil.test:{server.url.rsplit(':', 1)[1]}/")
    assert answer is not None
    assert answer.status == 400
    assert "error" in json.loads(answer.text())
    context.close()
