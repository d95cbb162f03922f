"""A few of the kills and failing disks of ``tests/faults``; all of them run with ``python -m tests.faults``."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import disk, failures, kills, steps

needs_compiler = pytest.mark.skipif(not disk.CAN_COMPILE, reason="needs Linux and the C compiler cc")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk.compiled(tmp_path_factory.mktemp("disk"))


def test_kills_at_random_moments_lose_nothing_and_leave_nothing_twice() -> None:
    found = kills.run(4)
    assert (found.kills, found.reopened) == (4, 4)
    assert found.acknowledged > 4 * kills.RATERS
    assert (found.lost, found.duplicated, found.half_states) == (0, 0, 0)


@needs_compiler
@pytest.mark.parametrize("operation", list(steps.OPERATIONS))
def test_a_kill_at_a_step_leaves_no_half_state(library: Path, operation: str) -> None:
    # A checkpoint has few steps, and in one of them a torn write has to be mended: all of them.
    found = steps.run(operation, library, at_most=100 if operation == "checkpoint" else 3)
    assert found.kills >= 3
    assert set(found.found) == {"before", "after"}
    assert found.left_behind == []


@needs_compiler
@pytest.mark.parametrize("name", list(failures.INJECTED))
def test_a_failing_disk_is_said_and_heals(library: Path, name: str) -> None:
    found = failures.run(name, library)
    assert (found.lost, found.duplicated) == (0, 0)
    assert found.refused >= failures.RATERS
    assert "goes on by itself" in found.red


def test_a_full_disk_is_said_and_heals() -> None:
    found = failures.run_small_disk()
    if found is None:
        pytest.skip("a small file system can only be mounted by root")
    assert (found.lost, found.duplicated) == (0, 0)
    assert "No space left" in found.red


def test_a_read_only_disk_is_said() -> None:
    refusal = failures.run_read_only()
    if refusal is None:
        pytest.skip("a read-only file system can only be mounted by root")
    assert "Read-only file system" in refusal
    assert "Nothing was changed" in refusal
