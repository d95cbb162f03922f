"""A data set goes to the hub whole, private unless asked otherwise, and every refusal is a sentence."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from feedback_store.dataset_export import write_dataset
from feedback_store.errors import PushRefused
from feedback_store.hub import push
from feedback_store.records import Message, Preference, UnpairedPreference

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
TOKEN = "hf_" + "x" * 34
PROMPT = (Message(role="user", content="Why?"),)
PREFERENCE = Preference("pref_1", PROMPT, "Because.", "No.", "pick", 1.0, "ana", None, ("v0", "v0"), None, NOW)
UNPAIRED = UnpairedPreference("label_1", PROMPT, "Because.", True, "rating", 1.0, "ana", ("v0",), NOW)


@dataclass
class Repo:
    """A data set of the hub."""

    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.parquet filter=lfs"})


@dataclass
class HubState:
    """What the stand-in holds, what it was asked, and what it is told to answer with."""

    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    commits: list[list[dict[str, Any]]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    is_deaf_to_private: bool = False


class HubServer(http.server.ThreadingHTTPServer):
    """A hub on this machine."""

    state: HubState

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes of a hub that an upload of regular (small) files uses."""

    @property
    def hub(self) -> HubServer:
        return cast("HubServer", self.server)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        state = self.hub.state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        state.asked.append(f"{self.command} {path}")
        state.tokens.add(self.headers.get("Authorization"))
        for ending, (status, text) in state.answers.items():
            if path.endswith(ending):
                return self.send(status, text, {"X-Error-Message": "as told"})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.send(200, json.dumps({"errors": [], "warnings": []}))
        found = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(preupload|commit|tree|revision)/main)?", path)
        if found is None or found[1] not in state.repos:
            return self.send(404, '{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        repo = state.repos[found[1]]
        if found[2] == "preupload":
            return self.send(200, json.dumps({"files": [self.mode(repo, file) for file in json.loads(body)["files"]]}))
        if found[2] == "tree":
            tree = [{"type": "file", "path": name, "size": 1, "oid": oid(data)} for name, data in repo.files.items()]
            return self.send(200, json.dumps(tree))
        if found[2] == "commit":
            return self.commit(found[1], repo, [json.loads(line) for line in body.splitlines()])
        siblings = [{"rfilename": name} for name in repo.files]
        info = {"id": found[1], "private": repo.private, "sha": "a" * 40, "siblings": siblings, "tags": []}
        return self.send(200, json.dumps(info))

    def create(self, asked: dict[str, Any]) -> None:
        state = self.hub.state
        state.created.append(asked)
        repo_id = f"{asked['organization']}/{asked['name']}"
        is_private = asked["visibility"] == "private" and not state.is_deaf_to_private
        status = 409 if repo_id in state.repos else 200
        state.repos.setdefault(repo_id, Repo(private=is_private))
        self.send(status, json.dumps({"url": f"{self.hub.url}/datasets/{repo_id}"}))

    def mode(self, repo: Repo, file: dict[str, Any]) -> dict[str, Any]:
        there = repo.files.get(file["path"])
        known = oid(there) if there is not None else None
        return {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": known}

    def commit(self, repo_id: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        state = self.hub.state
        state.commits.append(lines)
        for line in lines:
            if line["key"] == "file":
                repo.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del repo.files[line["value"]["path"]]
        sha = f"{len(state.commits):040x}"
        url = f"{self.hub.url}/datasets/{repo_id}/commit/{sha}"
        self.send(200, json.dumps({"commitUrl": url, "commitOid": sha}))

    def send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def oid(data: bytes) -> str:
    """The name git gives to these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture(autouse=True)
def _own_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the account of who runs the tests nor the hub's own questions about the caller."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(("127.0.0.1", 0), Hub) as server:
        server.state = HubState()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "set", [PREFERENCE], [UNPAIRED], name="Ours", created_at=NOW).directory


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def data_of(repo: Repo) -> dict[str, bytes]:
    return {name: data for name, data in repo.files.items() if name != ".gitattributes"}


def test_a_push_creates_a_private_data_set_with_the_very_bytes(hub: HubServer, exported: Path) -> None:
    url = push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    assert url == f"{hub.url}/datasets/team/prefs/commit/{1:040x}"
    (created,) = hub.state.created
    assert created == {"name": "prefs", "organization": "team", "visibility": "private", "type": "dataset"}
    assert hub.state.repos["team/prefs"].private
    assert data_of(hub.state.repos["team/prefs"]) == files(exported)
    (commit,) = hub.state.commits
    assert commit[0]["value"]["summary"] == "Export from Zephyr Loop"
    assert hub.state.tokens == {f"Bearer {TOKEN}"}


def test_a_public_push_creates_a_public_data_set(hub: HubServer, exported: Path) -> None:
    push(exported, "team/prefs", private=False, token=TOKEN, endpoint=hub.url)
    assert not hub.state.repos["team/prefs"].private


def test_the_token_of_the_environment_is_used(hub: HubServer, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_environment")
    push(exported, "team/prefs", endpoint=hub.url)
    assert hub.state.tokens == {"Bearer hf_from_the_environment"}


@pytest.mark.parametrize("is_asked_public", [True, False])
def test_a_private_data_set_that_is_there_is_used_and_stays_private(
    hub: HubServer, exported: Path, is_asked_public: bool
) -> None:
    hub.state.repos["team/prefs"] = Repo(private=True)
    push(exported, "team/prefs", private=not is_asked_public, token=TOKEN, endpoint=hub.url)
    assert hub.state.created == []
    assert hub.state.repos["team/prefs"].private
    assert data_of(hub.state.repos["team/prefs"]) == files(exported)


def test_pushing_again_sends_nothing_twice(hub: HubServer, exported: Path) -> None:
    push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    assert push(exported, "team/prefs", token=TOKEN, endpoint=hub.url).endswith("/commit/" + "a" * 40)
    assert len(hub.state.commits) == 1


def test_what_a_new_export_has_no_longer_is_taken_off_the_hub(hub: HubServer, exported: Path) -> None:
    push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    hub.state.repos["team/prefs"].files["data/made_by_hand.parquet"] = b"kept"
    write_dataset(exported, [PREFERENCE], [], name="Ours", created_at=NOW)
    push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    assert data_of(hub.state.repos["team/prefs"]) == files(exported) | {"data/made_by_hand.parquet": b"kept"}


def test_a_card_completed_by_hand_is_sent_as_it_is(hub: HubServer, exported: Path) -> None:
    card = (exported / "README.md").read_text() + "\nAsk the team before you use it.\n"
    (exported / "README.md").write_text(card)
    push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    assert hub.state.repos["team/prefs"].files["README.md"].decode() == card


# Refusals


def test_private_words_never_go_to_a_public_data_set(hub: HubServer, exported: Path) -> None:
    hub.state.repos["team/prefs"] = Repo(private=False)
    with pytest.raises(PushRefused, match=r"public .*, and a private push was asked for\. Nothing was sent"):
        push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    assert hub.state.asked == ["GET /api/datasets/team/prefs"]


def test_a_hub_that_makes_it_public_all_the_same_gets_nothing(hub: HubServer, exported: Path) -> None:
    hub.state.is_deaf_to_private = True
    with pytest.raises(PushRefused, match="private push was asked for"):
        push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    assert hub.state.commits == []
    assert data_of(hub.state.repos["team/prefs"]) == {}


def test_a_data_set_of_somebody_else_is_not_written_over(hub: HubServer, exported: Path) -> None:
    hub.state.repos["team/prefs"] = Repo(private=True, files={"README.md": b"#", "train.csv": b"a,b"})
    with pytest.raises(PushRefused, match=r"holds files that no export wrote \(train\.csv\)"):
        push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    assert hub.state.repos["team/prefs"].files == {"README.md": b"#", "train.csv": b"a,b"}


def test_only_an_unchanged_export_is_sent(hub: HubServer, exported: Path, tmp_path: Path) -> None:
    (exported / "secrets.env").write_text("KEY=1")
    with pytest.raises(PushRefused, match=r"other or missing files: secrets\.env.*Export it anew"):
        push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    with pytest.raises(PushRefused, match=r"it has no export\.json"):
        push(tmp_path / "absent", "team/prefs", token=TOKEN, endpoint=hub.url)
    assert hub.state.asked == []


@pytest.mark.parametrize("repo_id", ["prefs", "a/b/c", "team/pr efs", "team/.prefs", "team/a--b", "../x", "/", ""])
def test_a_bad_name_is_said_to_be_so(hub: HubServer, exported: Path, repo_id: str) -> None:
    with pytest.raises(PushRefused, match=r"Give owner/name of a data set\."):
        push(exported, repo_id, token=TOKEN, endpoint=hub.url)
    assert hub.state.asked == []


def test_no_token_is_said_to_be_so(hub: HubServer, exported: Path) -> None:
    for token in (None, "", "  "):
        with pytest.raises(PushRefused, match=r"there is no token.*set HF_TOKEN"):
            push(exported, "team/prefs", token=token, endpoint=hub.url)
    assert hub.state.asked == []


@pytest.mark.parametrize("token", ["hf_secret\nX-Evil: 1", "hf_sécret", "hf_secret more"])
def test_a_broken_token_is_refused_and_not_shown(hub: HubServer, exported: Path, token: str) -> None:
    with pytest.raises(PushRefused, match="characters no token has") as refused:
        push(exported, "team/prefs", token=token, endpoint=hub.url)
    assert "secret" not in str(refused.value)
    assert hub.state.asked == []


@pytest.mark.parametrize(
    ("ending", "status", "match"),
    [
        ("/api/repos/create", 401, r"does not know the token \(401\)\. Make a new one"),
        ("/api/repos/create", 403, r"may not write there \(403\)\. Use one with write permission for team"),
        ("/api/datasets/team/prefs", 403, r"may not write there \(403\)"),
        ("/api/datasets/team/prefs", 404, r"no such owner or data set \(404\)"),
        ("/preupload/main", 401, r"does not know the token \(401\)"),
        ("/commit/main", 403, r"may not write there \(403\)"),
        ("/commit/main", 413, r"answered 413: as told\. Try again later"),
        ("/api/repos/create", 500, r"answered 500: as told\. Try again later"),
    ],
)
def test_a_refusal_of_the_hub_is_a_sentence(
    hub: HubServer, exported: Path, ending: str, status: int, match: str
) -> None:
    hub.state.answers[ending] = (status, "{}")
    with pytest.raises(PushRefused, match=match) as refused:
        push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    assert str(refused.value).startswith("The export was not pushed to 'team/prefs': ")
    assert TOKEN not in str(refused.value)
    assert hub.state.commits == []


def test_a_card_the_hub_does_not_take_is_said_to_be_so(hub: HubServer, exported: Path) -> None:
    problem = {"errors": [{"message": '"license" must be one of many'}], "warnings": []}
    hub.state.answers["/api/validate-yaml"] = (400, json.dumps(problem))
    with pytest.raises(PushRefused, match=r'"license" must be one of many.*Check its address and the README\.md'):
        push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)
    assert hub.state.commits == []


@pytest.mark.parametrize("body", ["<html>welcome</html>", "{}", "[]"])
def test_an_address_that_is_no_hub_is_said_to_be_so(hub: HubServer, exported: Path, body: str) -> None:
    hub.state.answers["/api/datasets/team/prefs"] = (200, body)
    with pytest.raises(PushRefused, match="gave no proper answer"):
        push(exported, "team/prefs", token=TOKEN, endpoint=hub.url)


@pytest.mark.parametrize("endpoint", ["ftp://127.0.0.1", "http://[::1"])
def test_an_address_that_is_none_is_said_to_be_so(exported: Path, endpoint: str) -> None:
    with pytest.raises(PushRefused, match=re.escape(f"the hub {endpoint} ")):
        push(exported, "team/prefs", token=TOKEN, endpoint=endpoint)


def test_a_hub_out_of_reach_is_said_to_be_so(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PushRefused, match=r"the hub http://127\.0\.0\.1:9 cannot be reached"):
        push(exported, "team/prefs", token=TOKEN, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PushRefused, match="offline mode is enabled"):
        push(exported, "team/prefs", token=TOKEN, endpoint="http://127.0.0.1:9")


def test_a_hub_that_says_nothing_is_given_up(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feedback_store.hub._FIRST_ANSWER_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(PushRefused, match="cannot be reached"):
            push(exported, "team/prefs", token=TOKEN, endpoint=endpoint)
