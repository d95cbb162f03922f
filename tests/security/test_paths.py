"""A request names files in named folders only, wherever its words lead; everything else is sent, and removed again."""

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import ROOT, Server, environment, serving

ROWS = [{"prompt": f"Name {number} things", "chosen": "good", "rejected": "bad"} for number in range(4)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("paths")
    with serving(folder / "data", engine="scripted", retrain_every=0) as running:
        yield running


def data_of(server: Server) -> Path:
    return server.log.parent


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_only_what_lies_in_a_named_folder_is_imported_by_name(server: Server, tmp_path: Path) -> None:
    outside = written(tmp_path / "outside.jsonl", ROWS)
    imports = data_of(server) / "imports"
    imports.mkdir(exist_ok=True)
    (imports / "link.jsonl").symlink_to(outside)
    (imports / "folder").symlink_to(tmp_path)
    os.mkfifo(imports / "pipe.jsonl")
    (imports / "zero.jsonl").symlink_to("/dev/zero")
    up = os.path.relpath(outside, imports)
    named = [
        str(outside), up, f"{imports}/{up}", "link.jsonl", str(imports / "link.jsonl"), "folder/outside.jsonl",
        "pipe.jsonl", "zero.jsonl", "/dev/zero", "/dev/stdin", "/proc/self/environ", "/proc/self/root/etc/hostname",
        f"/proc/self/root{outside}", "/etc/passwd", "~/.bashrc", ".", "..", str(imports), f"file://{outside}",
        f"{outside}\0.jsonl", "../store.duckdb", str(data_of(server) / "store.duckdb"), "A" * 4000,
    ]  # fmt: skip
    for source in named:
        status, refused = server.refused("/v1/imports", {"source": source})
        assert status in (400, 422), source
        assert "imports" in refused["error"]["message"] or status == 422, refused
    assert server.get("/v1/imports")["imports"] == []
    written(imports / "mine.jsonl", ROWS)
    assert server.post("/v1/imports", {"source": "mine.jsonl"})["imported"] == 4
    assert server.post("/v1/imports", {"source": str(imports / "mine.jsonl")})["duplicates"] == 4
    assert (imports / "mine.jsonl").exists()


def test_there_and_not_there_sound_alike(server: Server, tmp_path: Path) -> None:
    said = [
        server.refused("/v1/imports", {"source": source})[1]["error"]["message"].replace(source, "X")
        for source in (str(written(tmp_path / "there.jsonl", ROWS)), str(tmp_path / "not-there.jsonl"))
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["rows.jsonl", "../../../escape.jsonl", "/etc/cron.d/rows.jsonl", "a\nb\x1b[2J.jsonl"])
def test_an_upload_is_imported_and_is_gone(server: Server, name: str) -> None:
    rows = [row | {"prompt": f"{name} {row['prompt']}"} for row in ROWS]
    content = "\n".join(map(json.dumps, rows)).encode()
    answer = server.http.post("/v1/imports", files={"file": (name, content)}, data={"format": "trl"})
    assert answer.json()["imported"] == 4, answer.text
    assert files_below(data_of(server) / "uploads") == []
    assert not list(data_of(server).rglob("escape.jsonl"))


def test_an_upload_that_cannot_be_read_is_gone_too(server: Server) -> None:
    answer = server.http.post("/v1/imports", files={"file": ("broken.jsonl", b"{not json\n")})
    assert answer.status_code == 400
    assert files_below(data_of(server) / "uploads") == []


@pytest.mark.parametrize(
    ("files", "data"),
    [
        ({"other": ("rows.jsonl", b"{}")}, {}),
        ({"file": ("rows.jsonl", b"{}")}, {"rejected": "best"}),
        ({"file": ("rows.jsonl", b"{}")}, {"source": "/etc/passwd"}),
        ({"file": ("rows.jsonl", b"{}")}, {"seed": "-1"}),
        ({"file": ("rows.jsonl", b"{}")}, {f"field{number}": "x" for number in range(50)}),
        ({"file": ("rows.jsonl", b"{}")}, {"format": "x" * 100_000}),
    ],
)
def test_a_form_that_is_none_is_refused(server: Server, files: Any, data: dict[str, str]) -> None:
    assert server.http.post("/v1/imports", files=files, data=data).status_code in (400, 422)


def test_a_dataset_is_a_name_below_exports(server: Server, tmp_path: Path) -> None:
    server.upload(written(tmp_path / "rows.jsonl", ROWS))
    exports = data_of(server) / "exports"
    exports.mkdir(mode=0o700, exist_ok=True)
    (exports / "elsewhere").symlink_to(tmp_path / "target")
    for out in (
        str(tmp_path / "set"),
        "../set",
        "a/b",
        "..",
        ".",
        ".hidden",
        "a\0b",
        "elsewhere",
        "a\nb",
        "~",
        "x" * 300,
    ):
        status, _ = server.refused("/v1/datasets", {"out": out})
        assert status in (400, 422), out
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "target").exists()
    assert server.post("/v1/datasets", {"out": "team-1"})["directory"] == str(exports / "team-1")


def test_a_benchmark_is_a_name_or_lies_in_its_folder(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody reads this\n")
    for benchmark in (str(secret), "/etc/passwd", "../store.duckdb", "/dev/zero", "/proc/self/environ"):
        status, refused = server.refused("/v1/benchmarks", {"benchmark": benchmark, "version": "v0"})
        assert status == 400, benchmark
        assert "benchmarks" in refused["error"]["message"]
        assert "nobody reads" not in str(refused)


def test_recipes_and_tastes_lead_nowhere(server: Server, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("method: dpo\n")
    for body in ({"recipe": str(tmp_path / "own.yaml")}, {"recipe": "../own"}, {"practice": "../practice"}):
        assert server.refused("/v1/runs", {**body, "dry_run": True})[0] in (400, 404, 422)


def test_the_command_takes_any_file_of_the_person(server: Server, tmp_path: Path) -> None:
    import subprocess
    import sys

    rows = [row | {"prompt": f"By hand: {row['prompt']}"} for row in ROWS]
    (tmp_path / "here").mkdir()
    source = written(tmp_path / "here" / "rows.jsonl", rows)
    out = tmp_path / "set"
    for command in (
        ["import", str(source), "--json"],
        ["import", "rows.jsonl", "--json"],
        ["export", "--format", "dataset", "--out", str(out), "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", "from chat_app.cli import main; main()", *command],
            env={**environment(data_of(server), engine="scripted"), "PYTHONPATH": str(ROOT)},
            cwd=source.parent, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["directory"] == str(out)
    assert (out / "README.md").is_file()
    assert not list((data_of(server) / "exports").glob("to-deliver*"))
    assert files_below(data_of(server) / "uploads") == []
    assert source.exists()


def test_erasing_a_person_clears_the_uploads(server: Server, tmp_path: Path) -> None:
    server.upload(
        written(
            tmp_path / "eve.jsonl",
            [{**ROWS[0], "prompt": "Eve asks", "rater": "eve", "preference_id": "p", "pick_id": None}],
        )
    )
    left = data_of(server) / "uploads" / "abcdef" / "left.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"nobody knows what this is")
    server.post("/v1/erasures", {"rater": "eve"})
    assert files_below(data_of(server) / "uploads") == []


def test_what_is_kept_is_for_its_owner_alone(server: Server) -> None:
    """After everything above: imports, exports, erasures, and the server's own files."""
    server.chat("Hello?")
    server.post("/v1/backups")
    server.post("/v1/snapshots")
    found = [data_of(server), *data_of(server).rglob("*")]
    ours = [path for path in found if path.parent.name != "imports"]  # those there are this test's
    open_to_others = {
        str(path.relative_to(data_of(server))): oct(path.lstat().st_mode)
        for path in ours
        if not path.is_symlink() and path.lstat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    }
    assert open_to_others == {}


def test_an_older_data_directory_is_closed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "versions" / "v1").mkdir(parents=True)
    (data / "versions" / "v1" / "manifest.json").write_text("{}")
    (data / "presets.yaml").write_text("")
    for path in (data, *data.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with serving(data, engine="scripted"):
        for path in (data, *data.rglob("*")):
            assert not path.lstat().st_mode & 0o077, path


def test_uploads_that_nobody_took_expire(tmp_path: Path) -> None:
    from chat_app.named_folders import remove_expired

    old, new = tmp_path / "uploads" / "a" / "old.jsonl", tmp_path / "uploads" / "b" / "new.jsonl"
    for path in (old, new):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    for path in (old, old.parent):
        os.utime(path, (time.time() - 4000,) * 2)
    remove_expired(tmp_path)
    assert files_below(tmp_path / "uploads") == [new]


def test_the_server_removes_what_an_earlier_one_left(tmp_path: Path) -> None:
    left = tmp_path / "data" / "uploads" / "a" / "left.jsonl"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    for path in (left, left.parent):
        os.utime(path, (time.time() - 4000,) * 2)
    with serving(tmp_path / "data", engine="scripted"):
        deadline = time.monotonic() + 60
        while left.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left.exists()


def test_names_and_folders(tmp_path: Path) -> None:
    from chat_app.named_folders import NamedFolders, folder_name, lent, upload_name

    (tmp_path / "in").mkdir()
    inside = written(tmp_path / "in" / "rows.jsonl", ROWS)
    folders = NamedFolders([tmp_path / "in", tmp_path / "not-there"])
    assert folders.file("rows.jsonl") == folders.file(str(inside)) == folders.file("./../in/rows.jsonl") == inside
    assert folders.file("../rows.jsonl") is None
    assert [name for name in ("a", "a.b", "../a", "a/b", "", ".a", "a..b", "a\n") if folder_name(name)] == ["a", "a.b"]
    assert upload_name("../../x y.jsonl.gz") == "x_y.jsonl.gz"
    assert upload_name(None) == upload_name("..") == "upload"
    with lent(tmp_path, inside) as copy:
        assert copy.read_text() == inside.read_text()
        assert copy.parent.stat().st_mode & 0o077 == 0
    assert not copy.parent.exists()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()] if folder.is_dir() else []
