"""The commands, through a running server and without one; exit codes, `--json`, and no lock errors ever."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from server import ROOT, environment, free_port, serving

COMMANDS = (
    "serve", "import", "export", "snapshot", "train", "practice", "evaluate", "compare", "versions", "promote",
    "rollback", "verify", "doctor",
)  # fmt: skip


def zloop(data_dir: Path, *arguments: str, **settings: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from chat_app.cli import main; main()", *arguments],
        env=environment(data_dir, engine="scripted", **settings),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def body(done: "subprocess.CompletedProcess[str]") -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "some.jsonl"
    lines = [{"prompt": f"Question {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(tmp_path: Path, command: str) -> None:
    done = zloop(tmp_path, command, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


def test_help_is_instant(tmp_path: Path) -> None:
    done = zloop(tmp_path, "--help")
    assert done.returncode == 0
    heavy = "import sys, chat_app.cli; print([m for m in ('duckdb', 'fastapi', 'gradio', 'torch') if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True, cwd=ROOT)
    assert seen.stdout.strip() == "[]"


def test_import_export_and_snapshot_without_a_server(tmp_path: Path, source: Path) -> None:
    data = tmp_path / "data"
    assert body(zloop(data, "import", str(source), "--json"))["imported"] == 30
    again = zloop(data, "import", str(source))
    assert "30 were there already" in again.stdout
    frozen = body(zloop(data, "snapshot", "--json"))
    assert frozen["train"] + frozen["held_out"] == 30
    assert body(zloop(data, "snapshot", "--json"))["snapshot"] == frozen["snapshot"]
    out = tmp_path / "out.jsonl"
    assert zloop(data, "export", "--out", str(out)).returncode == 0
    assert len(out.read_text().splitlines()) == 30
    checked = body(zloop(data, "verify", "--json"))
    assert checked == {"checked": [f"snapshot {frozen['snapshot']}"], "problems": []}


def test_the_command_of_a_run_is_shown_and_nothing_is_started(tmp_path: Path, source: Path) -> None:
    data = tmp_path / "data"
    zloop(data, "import", str(source))
    shown = zloop(data, "train", "--show-command", "--num-processes", "2", "--machines", "2")
    assert shown.returncode == 0, shown.stderr
    comments = [line for line in shown.stdout.splitlines() if line.startswith("#")]
    lines = shown.stdout.replace(" \\\n", "").splitlines()[len(comments) :]
    assert "#   main_process_port: " in shown.stdout
    assert "#   learning_rate: 0.0001" in comments
    assert [line.rpartition("--machine_rank ")[2][0] for line in lines] == ["0", "1"]
    command = body(zloop(data, "train", "--show-command", "--json"))
    assert " -m trainer.job " in command["lines"][0]
    assert Path(command["directory"], "config.json").is_file()
    assert not list((data / "runs").glob("run_*"))
    refused = zloop(data, "train", "--show-command", "--strategy", "fsdp2", "--num-processes", "2")
    assert refused.returncode == 1
    assert "fsdp2 shards a model over GPUs, and there is none" in refused.stderr


def test_verify_names_what_was_changed(tmp_path: Path, source: Path) -> None:
    data = tmp_path / "data"
    zloop(data, "import", str(source))
    frozen = body(zloop(data, "snapshot", "--json"))["snapshot"]
    part = data / "snapshots" / frozen / "train.parquet"
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    done = zloop(data, "verify")
    assert done.returncode == 1
    assert "train" in done.stderr


def test_the_same_commands_through_a_running_server(tmp_path: Path, source: Path) -> None:
    with serving(tmp_path / "data", engine="scripted") as server:
        data = tmp_path / "data"
        assert body(zloop(data, "import", str(source), "--json"))["imported"] == 30
        assert [row["version"] for row in body(zloop(data, "versions", "--json"))["versions"]] == ["v0"]
        findings = body(zloop(data, "doctor", "--json"))["findings"]
        assert any(server.url in finding["detail"] for finding in findings)
        second = zloop(data, "serve", port=free_port())
        assert second.returncode == 1
        assert server.url in second.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("import", "/nowhere/absent.jsonl"), "absent.jsonl"),
        (("import", "some.xml", "--format", "xml"), "xml"),
        (("snapshot",), "preferences"),
        (("train",), "preferences"),
        (("train", "--recipe", "nonsense"), "nonsense"),
        (("practice", "--taste", "salty"), "salty"),
        (("promote", "v7"), "v7"),
        (("dismiss", "v7"), "no open proposal of 'v7'"),
        (("rollback",), "nothing to roll back"),
        (("evaluate", "v7"), "v7"),
        (("evaluate", "v0", "--benchmark", "nonsense"), "The named ones are mt-bench"),
        (("evaluate", "v0", "--against", "v0", "--benchmark", "mt-bench"), "itself"),
        (("compare", "v0", "v7"), "v7"),
        (("compare", "v0"), "Name at least one other version"),
    ],
)
def test_a_refusal_is_a_sentence_and_exit_code_1(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = zloop(tmp_path / "data", *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    as_json = zloop(tmp_path / "data", *arguments, "--json")
    assert as_json.returncode == 1
    assert said in json.loads(as_json.stdout)["error"]["message"]


def test_serve_says_what_is_wrong_with_a_port_in_use(tmp_path: Path) -> None:
    with serving(tmp_path / "one", engine="scripted") as server:
        port = int(server.url.rpartition(":")[2])
        done = zloop(tmp_path / "two", "serve", port=port)
        assert done.returncode == 1
        assert f"Port {port}" in done.stderr


def test_serve_says_what_is_wrong_with_a_broken_data_directory(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a directory")
    done = zloop(in_the_way / "data", "serve", port=free_port())
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "data directory" in done.stderr
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "store.duckdb").write_bytes(b"no database at all" * 1000)
    done = zloop(damaged, "serve", port=free_port())
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "store.duckdb" in done.stderr


def test_serve_refuses_unknown_settings_and_models(tmp_path: Path) -> None:
    assert "ZLOOP_PROT" in zloop(tmp_path, "serve", prot=1).stderr
    absent = zloop(tmp_path, "serve", port=free_port(), model="/nowhere/model.gguf")
    assert absent.returncode == 1
    assert "/nowhere/model.gguf" in absent.stderr


def test_a_store_held_by_another_process_names_its_owner(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from feedback_store.store import FeedbackStore\n"
    code += "store = FeedbackStore.open(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "store.duckdb")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        done = zloop(tmp_path, "versions")
        assert done.returncode == 1
        assert str(holder.pid) in done.stderr
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()


def test_an_announcement_of_a_dead_server_is_ignored(tmp_path: Path) -> None:
    with serving(tmp_path, engine="scripted") as server:
        server.kill()
    assert (tmp_path / "server.json").exists()
    deadline = time.monotonic() + 10
    while (done := zloop(tmp_path, "versions")).returncode and time.monotonic() < deadline:
        time.sleep(0.2)
    assert done.returncode == 0, done.stderr
