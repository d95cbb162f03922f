"""How much memory there is: of the machine, and of GPUs by what nvidia-smi prints (a stand-in prints here)."""

from pathlib import Path

import psutil
import pytest

from trainer.room import MIB, Room, gpu_room, machine_room


def nvidia_smi(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program of that name on the path, and nothing else."""
    directory.mkdir(exist_ok=True)
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/bin:/usr/bin")


def test_the_machine_says_what_is_free() -> None:
    room = machine_room("cpu")
    assert room is not None
    assert 0 < room.free_bytes <= room.total_bytes == psutil.virtual_memory().total


def test_of_several_gpus_the_fullest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    nvidia_smi(tmp_path / "bin", monkeypatch, f'echo "$@" > {asked}; echo "143000, 143771"; echo "9000, 143771"')
    assert gpu_room() == Room(9000 * MIB, 143771 * MIB, "GPU memory")
    assert asked.read_text().strip() == "--query-gpu=memory.free,memory.total --format=csv,noheader,nounits"


@pytest.mark.parametrize("script", ["exit 9", "echo '[N/A], [N/A]'", "true", "echo NVIDIA-SMI has failed"])
def test_a_driver_that_cannot_say_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    nvidia_smi(tmp_path / "bin", monkeypatch, script)
    assert gpu_room() is None


def test_without_the_program_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine_room("gpu") is None
