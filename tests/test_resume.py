"""A few of the kills of ``tests/resume``; all of them run with ``python -m tests.resume``."""

from pathlib import Path

import pytest
import tiny_model
from faults import disk
from resume.kills import Bench, Nursery, at_places


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "data", tiny_model.shared_tiny())


@pytest.mark.skipif(not disk.CAN_COMPILE, reason="needs Linux and the C compiler cc")
def test_a_training_killed_at_a_change_of_a_file_ends_as_undisturbed(bench: Bench, tmp_path: Path) -> None:
    with Nursery(disk.compiled(tmp_path)) as nursery:
        outcome = at_places(bench, nursery, 3)
    assert (outcome.kills, outcome.runs, outcome.differences) == (3, 3, [])
