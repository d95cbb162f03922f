"""Out of memory under real limits: of the address space, and of a control group in which the kernel kills."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from resume.kills import RECIPE, Bench, Nursery

from trainer.cycle import Surroundings, ensure_prepared, ensure_trained
from trainer.errors import ChildFailed
from trainer.memory import MemoryWatch, group_limit, is_out_of_memory, kernel_kills, training_advice
from trainer.runs import Run
from trainer.versions import Versions

MIB = 2**20
GROUPS = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
MANY = replace(RECIPE, fast_step="off", batch_size=16, micro_batch_size=16, max_length=1024, retry_half_batch=True)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("memory"), tiny_model.shared_tiny(), MANY, steps=1, words=30)


@pytest.fixture
def once(tmp_path: Path) -> Bench:
    """The same, not to be tried again."""
    recipe = replace(MANY, retry_half_batch=False)
    return Bench(tmp_path, tiny_model.shared_tiny(), recipe, steps=1, words=30)


def trained(run: Run, nursery: Nursery, monkeypatch: pytest.MonkeyPatch, **confined: Any) -> Run:
    """Bring the training to its end as the supervisor does, each child confined. Raises ChildFailed."""
    monkeypatch.setattr("trainer.launchers.local.start_training", nursery.stand_in(run, **confined))
    monkeypatch.setattr("trainer.restarts.PAUSES_S", (0.0, 0.0, 0.0))
    ensure_prepared(run)
    try:
        ensure_trained(run, Surroundings(Versions(run.directory), lambda: "v0", lambda _s: time.sleep(0.05)))
    finally:
        nursery.wait()
    return run


def mapped(run: Run) -> int:
    """How much more than at its start a training had mapped at most."""
    return int(re.findall(r"mapped (\d+) bytes", "\n".join(run.log_tail(50)))[-1])


def test_half_as_many_at_once_come_to_the_same(bench: Bench, nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(bench.run(), nursery, monkeypatch)
    halved = bench.run()
    halved.note(halvings=1)
    trained(halved, nursery, monkeypatch)
    assert mapped(halved) < mapped(whole) - 32 * MIB, "nothing to choose a limit between"
    run = trained(bench.run(), nursery, monkeypatch, memory=(mapped(halved) + mapped(whole)) // 2)
    assert (run.halvings, run.record["resumed"]) == (1, 1)
    assert run.failure is None
    assert "Out of memory at step 1: the process had used " in "\n".join(run.log_tail(1000))
    for line, expected in zip(run.metrics(), whole.metrics(), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_without_a_retry_it_fails_with_measured_numbers(
    once: Bench, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ChildFailed) as failed:
        trained(once.run(), nursery, monkeypatch, memory=100 * MIB)
    assert re.match(
        r"The training failed: Out of memory at step 1: the process had used \d\.\d\d GiB of the \d\.\d\d GiB it may "
        r"have; \d+\.\d\d of? ?\w* ?.*were free\. Lower micro_batch_size \(now 16 pairs at once\) or max_length \(now "
        r"1024\) in the recipe, or set retry_half_batch: true",
        str(failed.value).replace("GiB of the machine's", "of the"),
    )


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that may have less than a training needs; made where the machine lets us."""
    for parent in GROUPS:
        limit = "memory.limit_in_bytes" if parent.name == "memory" else "memory.max"
        made = parent / "zephyr-loop-test"
        try:
            made.mkdir()
        except OSError:
            continue
        if (made / limit).exists():
            (made / limit).write_text(str(120 * MIB))
            yield made
            made.rmdir()
            return
        made.rmdir()
    pytest.skip("a control group can only be made by root, with the memory controller")


def test_a_kill_by_the_kernel_is_told_from_others(
    once: Bench, nursery: Nursery, monkeypatch: pytest.MonkeyPatch, group: Path
) -> None:
    with pytest.raises(ChildFailed, match="The training failed: the kernel killed it for lack of memory") as failed:
        trained(once.run(), nursery, monkeypatch, group=str(group))
    assert re.search(r"held 0\.\d\d GiB of the 0\.12 GiB their group may have when last looked at", str(failed.value))
    assert "Lower micro_batch_size (now 16" in str(failed.value)


def test_who_was_not_killed_for_memory_is_not_said_to_be() -> None:
    watch = MemoryWatch(2**22 - 1)
    watch.look()
    assert watch.sentence() is None
    assert group_limit(2**22 - 1) is None
    assert kernel_kills() is not None


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to get 8 bytes."),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("size mismatch"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_it_is_told_in_many_ways(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (MANY, r"^Lower micro_batch_size \(now 16 pairs at once\) or max_length \(now 1024\) in the recipe\.$"),
        (replace(MANY, micro_batch_size=1), r"^Lower max_length in the recipe \(now 1024\), or use a smaller base"),
    ],
)
def test_what_to_do_about_it(recipe: Any, said: str) -> None:
    assert re.search(said, training_advice(recipe))
