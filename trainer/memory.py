"""Running out of memory, said with measured numbers: by the child that saw it, by the parent of one that was killed.

`out_of_memory` turns what Python, torch or the system raises into a sentence. A child that the kernel killed says
nothing: `MemoryWatch` in the parent holds what its processes used and asks the kernel's own count of such kills.

Not covered: estimates before a start (`preflight.py`), swap, kills of a child on another machine.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from trainer.errors import OutOfMemory
from trainer.recipe import Recipe

GIB = 2**30
LOOK_EVERY_S = 1.0
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",  # torch on Linux
    "DefaultCPUAllocator: not enough memory",  # torch elsewhere
    "CUDA out of memory",
    "CUDA error: out of memory",
    "Cannot allocate memory",  # ENOMEM in the words of a native library
    "failed to map segment from shared object",  # a library that found no room to be loaded
    "std::bad_alloc",
)
_GROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # what systems say for "none" is above this


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is one of the ways to be told that there is no more memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return (isinstance(error, OSError) and error.errno == errno.ENOMEM) or any(said in str(error) for said in _SAID)


def out_of_memory(at: str, advice: str, error: BaseException) -> OutOfMemory:
    """The sentence, from inside the process that ran out; `at` says where, such as "at step 3"."""
    numbers = _of_gpu() if "CUDA" in str(error) else _of_process()
    return OutOfMemory(f"Out of memory {at}: {numbers}. {advice}")


def training_advice(recipe: Recipe) -> str:
    """What to do where a training ran out."""
    if recipe.micro_batch_size == 1:
        return f"Lower max_length in the recipe (now {recipe.max_length}), or use a smaller base or a larger machine."
    again = "" if recipe.retry_half_batch else ", or set retry_half_batch: true, which tries again with half as many"
    return (
        f"Lower micro_batch_size (now {recipe.micro_batch_size} pairs at once) or max_length (now {recipe.max_length})"
        f" in the recipe{again}."
    )


class MemoryWatch:
    """What the processes below `pid` hold, looked at now and then, and whether the kernel killed any process since."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._kills = kernel_kills()
        self._held = self._most = 0
        self._limit = group_limit(pid)
        self._next_look = 0.0

    def look(self) -> None:
        """Take a measurement, at most one each `LOOK_EVERY_S`."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_EVERY_S
        held = 0
        try:
            process = psutil.Process(self._pid)
            for one in [process, *process.children(recursive=True)]:
                held += one.memory_info().rss
        except psutil.Error:
            return
        if held:  # a dead process that is still to be reaped holds nothing
            self._held, self._most = held, max(self._most, held)
            self._limit = group_limit(self._pid)

    def sentence(self) -> str | None:
        """Why it died, where the kernel has killed for lack of memory meanwhile; None where it has not."""
        before, now = self._kills, kernel_kills()
        if before is None or now is None or now == before:
            return None
        memory = psutil.virtual_memory()
        limit = f" of the {_gib(self._limit)} their group may have" if self._limit is not None else ""
        return (
            f"the kernel killed it for lack of memory: its processes held {_gib(self._held)}{limit} when last looked "
            f"at, {_gib(self._most)} at most; the machine has {_gib(memory.total)}, {_gib(memory.available)} free now."
        )


def kernel_kills() -> int | None:
    """How many processes the kernel has killed for lack of memory since it started; None where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def group_limit(pid: int) -> int | None:
    """The bytes that the control group (a container, a service) of a process may have; None where there is no limit."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        folder, name = ("memory", "memory.limit_in_bytes") if controllers == "memory" else ("", "memory.max")
        if controllers in ("", "memory"):
            for file in (_GROUPS / folder / path.lstrip("/") / name, _GROUPS / folder / name):
                with suppress(OSError, ValueError):  # "max" is no number
                    if (limit := int(file.read_text(encoding="ascii"))) < _NO_LIMIT:
                        return limit
    return None


def _of_process() -> str:
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = psutil.virtual_memory()
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits = [limit for limit in (space, group_limit(os.getpid())) if limit is not None and 0 <= limit < _NO_LIMIT]
    limited = f" of the {_gib(min(limits))} it may have" if limits else ""
    return (
        f"the process had used {_gib(usage)}{limited}; {_gib(memory.available)} of the machine's "
        f"{_gib(memory.total)} were free"
    )


def _of_gpu() -> str:
    import torch

    free, total = torch.cuda.mem_get_info()
    return f"torch had taken {_gib(torch.cuda.max_memory_reserved())} on a GPU of {_gib(total)}, {_gib(free)} free"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
