"""Nobody who is named in the log can write a line of it; `verify` names what no manifest lists; states are small."""

import io
import json
import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from server import ROOT, environment, serving

from chat_app.__main__ import verify_all
from chat_app.presets import load_presets
from chat_app.settings import SettingsError, load_settings
from trainer.errors import BadRecipe
from trainer.recipe import load_recipe

FORGED = "2026-01-01 00:00:00,000 WARNING chat_app: all is well"
EVENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
BREAKS = ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029", "\x1b[1A\x1b[2K", "\x00", "\u202e"]


@pytest.mark.parametrize("mark", BREAKS, ids=ascii)
def test_a_name_writes_no_line_of_its_own(mark: str) -> None:
    from chat_app.log_lines import OneLineFormatter

    out = io.StringIO()
    log = logging.Logger("names")
    handler = logging.StreamHandler(out)
    handler.setFormatter(OneLineFormatter())
    log.addHandler(handler)
    log.warning("%s is not served.", f"v1{mark}{FORGED}")
    try:
        raise ValueError(f"bad{mark}{FORGED}")
    except ValueError:
        log.exception("It failed:")
    lines = out.getvalue().splitlines()  # of every kind of line end that there is
    assert sum(bool(EVENT.match(line)) for line in lines) == 2
    assert len(lines) > 3  # a traceback has its lines
    assert all(line.startswith(("  | ", lines[0][:4])) for line in lines)
    assert "\x1b" not in out.getvalue()


def test_what_a_library_prints_is_no_event() -> None:
    from chat_app.log_lines import Aside

    out = io.StringIO()
    print(f"one\n{FORGED}\rthree", "four", sep="\n", file=Aside(out))
    assert all(line.startswith("  | ") for line in out.getvalue().splitlines())


def test_a_real_server_writes_one_line_an_event(tmp_path: Path) -> None:
    with serving(tmp_path / "data", engine="scripted") as server:
        for mark in ("\n", "\r", "\u2028"):
            server.http.post("/v1/imports", json={"source": f"x{mark}{FORGED}"})
            server.http.get(f"/v1/runs/x%0A{FORGED}")
            server.http.post("/v1/versions/v0/promote", json={"reason": f"x{mark}{FORGED}", "by": f"x{mark}{FORGED}"})
        written = server.log.read_text()
    assert not [line for line in written.splitlines() if line.startswith("2026-01-01")]


# --- verify ----------------------------------------------------------------------------------------------------------


def zloop(data_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from chat_app.cli import main; main()", *words],
        env={**environment(data_dir, engine="scripted"), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a snapshot and a backup."""
    folder = tmp_path_factory.mktemp("verified")
    rows = [{"prompt": f"Name {number} things", "chosen": "good", "rejected": "bad"} for number in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for words in (("import", str(folder / "rows.jsonl")), ("snapshot",), ("backup",), ("verify",)):
        done = zloop(folder / "data", *words)
        assert done.returncode == 0, done.stderr
    return folder / "data"


def snapshot_of(data: Path) -> Path:
    return next((data / "snapshots").glob("*/manifest.json")).parent


STRANGERS = {
    "a file": lambda data: snapshot_of(data) / "extra.parquet",
    "a hidden file": lambda data: snapshot_of(data) / ".extra",
    "a file in a folder": lambda data: snapshot_of(data) / "more" / "extra.bin",
    "a snapshot without a manifest": lambda data: data / "snapshots" / ("0" * 64) / "train.parquet",
    "a file beside snapshots": lambda data: data / "snapshots" / "extra.bin",
    "a version without a manifest": lambda data: data / "versions" / "v7" / "adapter.gguf",
    "a version of another name": lambda data: data / "versions" / "evil" / "manifest.json",
    "a file beside backups": lambda data: data / "backups" / "evil.bin",
    "a backup of another name": lambda data: data / "backups" / "evil.duckdb",
    "a log of a backup": lambda data: next((data / "backups").glob("*.duckdb")).with_suffix(".duckdb.wal"),
    "a folder of backups": lambda data: data / "backups" / "b" / "evil",
}


@pytest.mark.parametrize("name", list(STRANGERS))
def test_verify_names_what_no_manifest_lists(data: Path, name: str) -> None:
    settings = load_settings({"ZLOOP_DATA_DIR": str(data), "ZLOOP_ENGINE": "scripted"})
    assert verify_all(settings)[0] == []
    path = STRANGERS[name](data)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"{}")
    try:
        problems = verify_all(settings)[0]
        assert any(str(path) in one or str(path.parent) in one for one in problems), problems
    finally:
        path.unlink()
        for folder in made:
            folder.rmdir()


def test_verify_names_links(data: Path, tmp_path: Path) -> None:
    train = snapshot_of(data) / "train.parquet"
    moved = tmp_path / "train.parquet"
    train.rename(moved)
    train.symlink_to(moved)
    try:
        done = zloop(data, "verify")
        assert done.returncode == 1
        assert str(train) in done.stderr
    finally:
        train.unlink()
        moved.rename(train)


# --- what is read at the start ---------------------------------------------------------------------------------------

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
)
YAML = {
    "laughs": LAUGHS,
    "deep": "[" * 5_000 + "]" * 5_000,
    "deep blocks": "\n".join("  " * depth + "a:" for depth in range(200)),
    "large": "a: " + "x" * 1_000_000,
    "an anchor": "Short: &one\n  temperature: 0.2\n",
    "a merge": "Short: &one {temperature: 0.2}\nLong:\n  <<: *one\n",
    "many values": "a: [" + "1," * 60_000 + "1]",
}


@pytest.mark.parametrize("name", list(YAML))
def test_yaml_that_unfolds_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "bomb.yaml").write_text(YAML[name])
    with pytest.raises(SettingsError, match=r"limit|anchor"):
        load_presets(tmp_path / "bomb.yaml")
    with pytest.raises(BadRecipe, match=r"limit|anchor"):
        load_recipe("bomb", tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"{}," * 20_000_000 + b"{}]"])
def test_json_that_unfolds_is_refused(tmp_path: Path, content: bytes) -> None:
    from feedback_store.bounded import load_json

    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.json"):
        load_json(tmp_path / "state.json")


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    from feedback_store.bounded import TooMuch, load_yaml

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(TooMuch, match="not a regular file"):
            load_yaml(path)


@pytest.mark.parametrize("name", ["presets.yaml", "schedule.json", "server.json", "runs/run_1/config.json"])
def test_a_server_starts_or_says_why_in_little_memory(tmp_path: Path, name: str) -> None:
    data = tmp_path / "data"
    (data / name).parent.mkdir(parents=True)
    bomb = YAML["laughs"].encode() if name.endswith("yaml") else b'{"a": [' + b"[]," * 40_000_000 + b"[]]}"
    (data / name).write_bytes(bomb)
    limit = 2 * 2**30
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from chat_app.cli import main; main()", "stats"],
        env={**environment(data, engine="scripted"), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False, timeout=120, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 if name.startswith(("server", "runs")) else name in done.stderr
