"""Kind 1: no value of a page's event makes Gradio read a file, on any mount, whatever component it is for.

Twice: over a socket, where the guard refuses the event; and below the guard, where Gradio itself refuses to read.
"""

import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server import Server, serving
from tiny_model import build_tiny_gguf

MOUNTS = ("", "/rate", "/admin")
SECRET = "a-secret-that-nobody-may-read"
SESSION = "abcdefgh12"
FILE = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tiny = build_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    with serving(tmp_path_factory.mktemp("data"), engine="scripted", model=tiny) as running:
        yield running


def values_that_name(path: str) -> list[Any]:
    """A file as Gradio knows it, and the same hidden in what components take."""
    one = {"path": path, "meta": FILE}
    return [
        one,
        {"path": path, "meta": FILE, "orig_name": "x", "url": None, "is_stream": False},
        {"path": path, "url": f"file://{path}", "meta": FILE},
        [one],
        [{"role": "user", "content": one}],
        [{"role": "user", "content": {"file": one, "alt_text": None}}],
        {"files": [one], "text": "x"},
        {"a": {"b": {"c": [[one]]}}},
        {"path": path},
    ]


def events(server: Server, mount: str) -> list[tuple[int, int]]:
    """(index, number of inputs) of every handler of a page."""
    config = server.get(f"{mount}/config")
    return [(one["id"], len(one["inputs"])) for one in config["dependencies"]]


def join(server: Server, mount: str, body: dict[str, Any]) -> httpx.Response:
    return server.http.post(f"{mount}/gradio_api/queue/join", json=body)


@pytest.mark.parametrize("mount", MOUNTS)
def test_no_event_reads_a_file_it_names(server: Server, mount: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    store = server.log.parent / "store.duckdb"
    named = [str(secret), "/proc/self/environ", "/dev/zero", str(store), f"{server.log.parent}/uploads/../store.duckdb",
             "http://127.0.0.1:1/x", "https://example.invalid/x"]  # fmt: skip
    statuses = {
        join(server, mount, {"data": [value] * max(1, inputs), "fn_index": index, "session_hash": SESSION}).status_code
        for path in named
        for value in values_that_name(path)
        for index, inputs in events(server, mount)[:: 1 if path == str(secret) else 7]
    }  # fmt: skip
    assert statuses <= {422, 429}, statuses
    assert 422 in statuses
    told = {"data": [], "fn_index": 0, "session_hash": "abcdefgh12", "event_data": values_that_name(str(secret))[0]}
    assert join(server, mount, told).status_code == 422
    assert not [one for one in uploads(server) if one.is_file() and SECRET in one.read_text(errors="replace")]
    assert server.get("/livez")["status"] == "ok"


def uploads(server: Server) -> list[Path]:
    return list((server.log.parent / "uploads").rglob("*"))


def test_uploads_lie_in_a_folder_of_our_own_and_are_not_served(server: Server) -> None:
    folder = server.log.parent / "uploads"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    sent = server.http.post("/admin/gradio_api/upload", files={"files": ("a.jsonl", b'{"a": 1}')})
    assert sent.status_code == 200
    path = sent.json()[0]
    assert Path(path).is_relative_to(folder)
    for mount in MOUNTS:
        assert server.http.get(f"{mount}/gradio_api/file={path}").status_code == 404


@pytest.mark.parametrize("mount", ["", "/rate"])
def test_only_the_page_with_an_upload_takes_files(server: Server, mount: str) -> None:
    sent = server.http.post(f"{mount}/gradio_api/upload", files={"files": ("a.jsonl", b"x")})
    assert sent.status_code == 404


def test_a_session_must_be_named(server: Server) -> None:
    for session in (None, "", "x", "../../etc", "a" * 65, 7, ["abcdefgh"]):
        body = {"data": [], "fn_index": 0, "session_hash": session}
        assert join(server, "", body).status_code == 422


def test_made_up_sessions_are_few(server: Server) -> None:
    """Each costs the server memory: one address opens so many a minute, and no more."""
    statuses = [
        join(server, "/rate", {"data": [], "fn_index": 0, "session_hash": f"madeup{number:06}"}).status_code
        for number in range(400)
    ]
    assert statuses.count(429) >= 400 - 2 * 120  # a minute may turn over in between
    assert statuses[0] == 200


BELOW_THE_GUARD = """
import asyncio, json, sys
from pathlib import Path
from starlette.routing import Mount
from chat_app.__main__ import create_application, open_store
from chat_app.settings import load_settings
from gradio import processing_utils
from gradio.context import LocalContext
from gradio.exceptions import InvalidPathError

settings = load_settings({"ZLOOP_DATA_DIR": sys.argv[1], "ZLOOP_ENGINE": "scripted"})
refused = {}
with open_store(settings) as store:
    app = create_application(settings, store, lambda: None, lambda _: None)
    for mount in (one for one in app.routes if isinstance(one, Mount)):
        blocks = mount.app.get_blocks()
        LocalContext.blocks.set(blocks)
        box = next(one for one in blocks.blocks.values() if hasattr(one, "GRADIO_CACHE"))
        value = {"path": sys.argv[2], "meta": {"_type": "gradio.FileData"}}
        try:
            asyncio.run(processing_utils.async_move_files_to_cache(value, box, check_in_upload_folder=True))
            refused[mount.path] = False
        except InvalidPathError:
            refused[mount.path] = True
print(json.dumps(refused))
"""


def test_gradio_itself_refuses_to_read_on_every_mount(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    said = subprocess.run(
        [sys.executable, "-c", BELOW_THE_GUARD, str(tmp_path / "data"), str(secret)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout.splitlines()[-1]) == {"/admin": True, "/rate": True, "": True}


def test_what_an_earlier_server_was_sent_is_gone_at_the_next_start(tmp_path: Path) -> None:
    with serving(tmp_path / "data", engine="scripted") as first:
        sent = first.http.post("/admin/gradio_api/upload", files={"files": ("a.jsonl", b"x")}).json()[0]
        assert Path(sent).exists()
        first.kill()  # so that nothing tidies up at the end
    with serving(tmp_path / "data", engine="scripted"):
        assert not Path(sent).exists()
