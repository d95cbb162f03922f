"""The commands of the data, with and without a server: what they print, what they refuse."""

import json
from pathlib import Path

import pytest
from server import serving
from test_cli import body, zloop

ROWS = [{"prompt": f"Question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl"
    lines = [*ROWS, ROWS[0] | {"chosen": ""}, ROWS[1] | {"chosen": "N/A"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("command", ["stats", "sql", "learn", "erase", "backup", "restore"])
def test_every_command_has_help_and_json(tmp_path: Path, command: str) -> None:
    done = zloop(tmp_path, command, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


def test_an_import_names_the_rows_it_skipped(tmp_path: Path, source: Path) -> None:
    done = zloop(tmp_path / "data", "import", str(source), "--show-skipped")
    assert "Imported 30 preferences" in done.stdout
    assert "format trl: it has" in done.stdout
    assert "empty: row 31, 32" in done.stdout
    wrong = zloop(tmp_path / "data", "import", str(source), "--format", "morse")
    assert wrong.returncode == 1
    assert "morse" in wrong.stderr


def test_stats_sql_and_learn(tmp_path: Path, source: Path) -> None:
    data = tmp_path / "data"
    zloop(data, "import", str(source))
    said = zloop(data, "stats", "--agreement")
    assert "preferences: 30 trl" in said.stdout
    assert "0 pairs were judged in opposite ways." in said.stdout
    table = zloop(data, "sql", "SELECT source, count(*) AS number FROM preferences GROUP BY ALL")
    assert table.stdout.splitlines() == ["source  number", "trl     30"]
    refused = zloop(data, "sql", "DROP TABLE picks", "--json")
    assert refused.returncode == 1
    assert json.loads(refused.stdout)["error"]["type"] == "bad_request"
    assert "teaches nothing" in zloop(data, "learn", "rater", "ada").stdout
    assert zloop(data, "learn", "conversation", "conv_none").returncode == 1


def test_export_in_every_format(tmp_path: Path, source: Path) -> None:
    data = tmp_path / "data"
    zloop(data, "import", str(source))
    for format_ in ("trl", "csv"):
        out = tmp_path / f"out.{format_}"
        assert zloop(data, "export", "--format", format_, "--out", str(out)).returncode == 0
        assert "Question 7" in out.read_text()
    folder = tmp_path / "set"
    written = body(zloop(data, "export", "--format", "dataset", "--out", str(folder), "--json"))
    assert sum(written["rows"].values()) == 30
    assert written["directory"] == str(folder)
    assert zloop(data, "export", "--format", "trl").returncode == 1
    assert zloop(data, "export", "--format", "dataset", "--raters", "shout").returncode == 1
    assert zloop(data, "export", "--format", "csv", "--out", str(tmp_path / "no" / "such.csv")).returncode == 1


def test_erase_backup_and_restore(tmp_path: Path) -> None:
    data = tmp_path / "data"
    source = tmp_path / "team.jsonl"
    rows = [row | {"rater": "eve", "preference_id": str(n), "pick_id": None} for n, row in enumerate(ROWS)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    zloop(data, "import", str(source))
    backup = body(zloop(data, "backup", "--json"))["path"]
    assert backup in zloop(data, "backup", "--list").stdout
    body(zloop(data, "export", "--format", "dataset", "--json"))
    erased = body(zloop(data, "erase", "eve", "--json"))
    assert erased["counts"]["preferences"] == 30
    assert "eve" not in json.dumps(body(zloop(data, "stats", "--json")))
    unknown = zloop(data, "erase", "eva")
    assert unknown.returncode == 1
    assert "eva" in unknown.stderr
    restored = zloop(data, "restore", backup)
    assert restored.returncode == 0, restored.stderr
    assert body(zloop(data, "stats", "--json"))["counts"]["preferences"]["trl"] == 0  # erased for ever
    nothing = zloop(data, "restore", str(tmp_path / "none.duckdb"))
    assert nothing.returncode == 1
    assert nothing.stderr.startswith("zloop: ")


def test_with_a_server_the_commands_go_through_it(tmp_path: Path, source: Path) -> None:
    data = tmp_path / "data"
    with serving(data, engine="scripted") as server:
        assert body(zloop(data, "import", str(source), "--json"))["imported"] == 30
        assert server.get("/v1/statistics")["counts"]["preferences"]["trl"] == 30
        backup = body(zloop(data, "backup", "--json"))["path"]
        refused = zloop(data, "restore", backup)
        assert refused.returncode == 1
        assert server.url in refused.stderr
        assert "Stop it first" in refused.stderr
        assert "trl" in zloop(data, "sql", "SELECT DISTINCT source FROM preferences").stdout
