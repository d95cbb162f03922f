"""A few of the kills of ``tests/resume``; all of them run with ``python -m tests.resume``. And a disk that fills up."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_model
from faults import disk
from faults.failures import mounted
from resume.kills import Bench, Nursery, at_places, differences, undisturbed

from trainer.checkpoints import last_step


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(disk.compiled(tmp_path_factory.mktemp("disk")) if disk.CAN_COMPILE else None) as made:
        yield made


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "data", tiny_model.shared_tiny())


@pytest.mark.skipif(not disk.CAN_COMPILE, reason="needs Linux and the C compiler cc")
def test_a_training_killed_at_a_change_of_a_file_ends_as_undisturbed(bench: Bench, nursery: Nursery) -> None:
    outcome = at_places(bench, nursery, 3)
    assert (outcome.kills, outcome.runs, outcome.differences) == (3, 3, [])


def test_a_disk_that_fills_up_is_said_and_with_room_again_it_goes_on(
    bench: Bench, nursery: Nursery, tmp_path: Path
) -> None:
    whole, _, _ = undisturbed(bench, nursery)
    with mounted(tmp_path) as small:
        if small is None:
            pytest.skip("a small file system can only be mounted by root")
        run = Bench(small / "data", tiny_model.shared_tiny()).run()
        subprocess.run(["mount", "-o", "remount,size=1800k", small], check=True)  # two checkpoints, and no third
        nursery.start(run)
        assert nursery.wait()[0] == 1
        assert run.failure is not None, run.log_tail(5)
        assert run.failure.startswith("The disk was full after step 6: 0 MiB were free below ")
        assert run.failure_kind == "DiskFull"
        assert last_step(run.directory) == 4
        assert not (run.directory / "checkpoints" / "checkpoint-6").exists(), "it holds the room"

        subprocess.run(["mount", "-o", "remount,size=24m", small], check=True)
        run.restart()
        nursery.start(run)
        assert nursery.wait()[0] == 0, run.log_tail(5)
        assert differences(run, whole) == []
