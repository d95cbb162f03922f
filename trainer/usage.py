"""What a training took: the measured side of the preflight, written into training.json by `job.py`.

Peak memory is the high-water mark of each process's own memory plus the launcher's. It is read from /proc where the
system has it: `getrusage` counts what a process held before it became this program, and what its parent held then.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB$", re.MULTILINE)


class Usage:
    """Of this process, one of those of a run."""

    def __init__(self) -> None:
        self._training_began: float | None = None
        self._training_ended: float | None = None

    @contextmanager
    def training(self) -> Iterator[None]:
        """The block is the training; what came before was loading."""
        self._training_began = time.time()
        yield
        self._training_ended = time.time()

    def measured(self, accelerator: Any) -> dict[str, Any]:
        """Bytes and seconds over all processes; every process of the run must call it."""
        import torch

        assert self._training_began is not None
        assert self._training_ended is not None
        mine = torch.tensor([peak_memory_bytes(), _peak_device_bytes()], device=accelerator.device, dtype=torch.int64)
        every = accelerator.gather(mine).reshape(-1, 2)
        device_bytes = int(every[:, 1].max())
        return {
            "peak_memory_bytes": int(every[:, 0].sum()) + _launcher_bytes(),
            "peak_device_memory_bytes": device_bytes or None,
            "loading_s": round(self._training_began - psutil.Process().create_time(), 2),
            "training_s": round(self._training_ended - self._training_began, 2),
            "training_began": self._training_began,
            "ended": time.time(),
        }


def peak_memory_bytes() -> int:
    """The most resident memory this process has had."""
    with suppress(OSError):
        found = _PEAK.search(Path("/proc/self/status").read_text(encoding="ascii"))
        if found is not None:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_device_bytes() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0


def _launcher_bytes() -> int:
    """What the process holds that started this one, where that is accelerate's."""
    with suppress(psutil.Error):
        launcher = psutil.Process().parent()
        if launcher is not None and any("accelerate" in word for word in launcher.cmdline()):
            return int(launcher.memory_info().rss)
    return 0


def together(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the stages of a run took one after the other: the largest memory, the seconds of all.

    What comes between two stages (merging, the second model, its references) is loading; of a job that went on after a
    kill only what its new process took.
    """
    loading_s = stages[0]["loading_s"]
    for before, stage in pairwise(stages):
        loading_s += max(0.0, min(stage["training_began"] - before["ended"], stage["loading_s"]))
    device = [stage["peak_device_memory_bytes"] for stage in stages if stage["peak_device_memory_bytes"]]
    return {
        "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in stages),
        "peak_device_memory_bytes": max(device, default=None),
        "loading_s": round(loading_s, 2),
        "training_s": round(sum(stage["training_s"] for stage in stages), 2),
        "training_began": stages[0]["training_began"],
        "ended": stages[-1]["ended"],
    }
